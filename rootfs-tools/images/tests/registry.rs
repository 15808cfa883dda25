//! The registry client against Debian's `docker-registry`, and against one that misbehaves.
#![allow(clippy::unwrap_used, clippy::expect_used, unreachable_pub, dead_code)]

mod common;
#[path = "common/faults.rs"]
mod faults;

use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use caisson_images::import::{ImportOptions, import_path};
use caisson_images::registry::{AuthFile, Client, Credentials, Options, Outcome, Progress, Quiet, RegistryError};
use caisson_images::{Digest, Image, Reference, Store};
use common::registry::{Kind, Registry, authority};
use common::{run, skopeo_copy, umoci_layout};
use faults::{Fault, Proxy};

/// Quick pauses, and credentials of the test's own.
fn options(directory: &Path) -> Options {
    Options {
        auth: AuthFile::at(directory.join("auth.json")),
        certificates: vec![directory.join("certs.d")],
        pause: Duration::from_millis(1),
        attempts: 4,
        ..Options::default()
    }
}

fn reference(text: impl AsRef<str>) -> Reference {
    text.as_ref().parse().unwrap()
}

/// A store with one image, `busybox:latest`, and its directory.
fn fixture() -> (tempfile::TempDir, Store, Image) {
    let directory = tempfile::tempdir().unwrap();
    let layout = umoci_layout(directory.path());
    let store = Store::open(directory.path().join("store")).unwrap();
    import_path(&store, Path::new(&layout), &ImportOptions::default()).unwrap();
    let image = store.resolve("busybox").unwrap();
    (directory, store, image)
}

fn empty_store(directory: &Path, name: &str) -> Store {
    Store::open(directory.join(name)).unwrap()
}

fn assert_empty(store: &Store) {
    for sub in ["blobs/sha256", "tmp"] {
        assert_eq!(std::fs::read_dir(store.directory().join(sub)).unwrap().count(), 0, "{sub}");
    }
}

#[derive(Default)]
struct Outcomes(Mutex<Vec<Outcome>>);

impl Progress for Outcomes {
    fn end(&self, _: &Digest, how: Outcome) {
        self.0.lock().unwrap().push(how);
    }
}

impl Outcomes {
    fn count(&self, how: Outcome) -> usize {
        self.0.lock().unwrap().iter().filter(|other| **other == how).count()
    }
}

#[test]
fn images_go_to_a_registry_and_come_back() {
    let (directory, store, image) = fixture();
    let registry = Registry::start(directory.path(), Kind::Open);
    let client = Client::new(options(directory.path()));
    let name = reference(format!("{}/team/app:1", registry.host()));

    let outcomes = Outcomes::default();
    let pushed = client.push(&store, &image, &name, &outcomes).unwrap();
    assert_eq!(pushed.digest, image.digest);
    assert_eq!(outcomes.count(Outcome::Moved), 3);
    // Again: nothing moves. Under another name: the registry takes it from the first.
    let outcomes = Outcomes::default();
    client.push(&store, &image, &name, &outcomes).unwrap();
    assert_eq!(outcomes.count(Outcome::Present), 3);
    store.tag("busybox", &name).unwrap();
    let image = store.resolve("busybox").unwrap();
    let other = reference(format!("{}/other/app:2", registry.host()));
    let outcomes = Outcomes::default();
    client.push(&store, &image, &other, &outcomes).unwrap();
    assert_eq!(outcomes.count(Outcome::Mounted), 3);

    // By tag, and by digest; what is here is not fetched again.
    let second = empty_store(directory.path(), "second");
    let outcomes = Outcomes::default();
    let pulled = client.pull(&second, &name, &outcomes).unwrap();
    assert_eq!((pulled.id(), outcomes.count(Outcome::Moved)), (image.id(), 2));
    for layer in &pulled.layers {
        second.verify_layer(layer).unwrap();
    }
    let outcomes = Outcomes::default();
    let by_digest = other.with_digest(image.digest);
    client.pull(&second, &by_digest, &outcomes).unwrap();
    assert_eq!(outcomes.count(Outcome::Present), 2);
    assert_eq!(second.resolve(&by_digest.to_string()).unwrap().references.len(), 2);

    // skopeo reads what we pushed, and we read what it pushed, also with zstd, and as docker's schema 2.
    let host = registry.host();
    run("skopeo", &["inspect", "--tls-verify=false", &format!("docker://{host}/team/app:1")]);
    let source = format!("oci:{}/busybox:latest", directory.path().display());
    let to = |tag: &str| format!("docker://{host}/team/app:{tag}");
    skopeo_copy(&["--dest-tls-verify=false", "--dest-compress-format", "zstd"], &source, &to("zstd"));
    skopeo_copy(&["--dest-tls-verify=false", "--format", "v2s2"], &source, &to("docker"));
    for tag in ["zstd", "docker"] {
        let store = empty_store(directory.path(), tag);
        let image = client.pull(&store, &name.with_tag(tag).unwrap(), &Quiet).unwrap();
        for layer in &image.layers {
            store.verify_layer(layer).unwrap();
        }
    }
    let mut tags = client.tags(&name).unwrap();
    tags.sort();
    assert_eq!(tags, ["1", "docker", "zstd"]);
    assert!(matches!(client.tags(&reference(format!("{host}/none"))), Err(RegistryError::NotFound { .. })));
    let missing = client.pull(&second, &name.with_tag("none").unwrap(), &Quiet);
    assert!(matches!(missing, Err(RegistryError::NotFound { .. })), "{missing:?}");

    // podman, too; through an index of several platforms, whose other manifests we do without.
    let (root, runroot) = (directory.path().join("podman"), directory.path().join("podman-run"));
    let podman = |arguments: &[&str]| {
        let mut all =
            vec!["--root", root.to_str().unwrap(), "--runroot", runroot.to_str().unwrap(), "--storage-driver", "vfs"];
        all.extend(arguments);
        run("podman", &all)
    };
    podman(&["pull", "-q", "--tls-verify=false", &format!("{host}/team/app:1")]);
    podman(&["manifest", "create", "list"]);
    podman(&["manifest", "add", "--tls-verify=false", "--arch", "arm64", "--os", "linux", "list", &to("docker")]);
    podman(&["manifest", "add", "--tls-verify=false", "--arch", "amd64", "--os", "linux", "list", &to("1")]);
    podman(&["manifest", "push", "--tls-verify=false", "list", &to("many")]);
    podman(&["rmi", "-fa"]);
    let store = empty_store(directory.path(), "many");
    let image = client.pull(&store, &name.with_tag("many").unwrap(), &Quiet).unwrap();
    assert_eq!(image.digest, pushed.digest);
    assert_ne!(image.top.digest, pushed.digest);
    assert_eq!(store.resolve("many").ok().map(|image| image.id()), None);
    assert_eq!(store.resolve(&name.with_tag("many").unwrap().to_string()).unwrap().id(), image.id());
    // And it can be pushed on: the platform's manifest alone.
    client.push(&store, &image, &reference(format!("{host}/again:1")), &Quiet).unwrap();
}

#[test]
fn credentials_open_a_registry() {
    let (directory, store, image) = fixture();
    let registry = Registry::start(directory.path(), Kind::Password);
    let options = options(directory.path());
    let client = Client::new(options.clone());
    let name = reference(format!("{}/app:1", registry.host()));
    let denied = client.push(&store, &image, &name, &Quiet);
    assert!(
        matches!(&denied, Err(error @ RegistryError::Denied { .. }) if error.to_string().contains("caisson login")),
        "{denied:?}"
    );
    let credentials = |password: &str| Credentials::Password { user: "user".to_owned(), password: password.to_owned() };
    assert!(matches!(client.check(&registry.host(), &credentials("wrong")), Err(RegistryError::Denied { .. })));
    client.check(&registry.host(), &credentials("secret")).unwrap();
    options.auth.store(&registry.host(), &credentials("secret")).unwrap();
    client.push(&store, &image, &name, &Quiet).unwrap();
    let second = empty_store(directory.path(), "second");
    client.pull(&second, &name, &Quiet).unwrap();
    // The file is docker's: skopeo reads it.
    let file = directory.path().join("auth.json");
    run(
        "skopeo",
        &["inspect", "--tls-verify=false", "--authfile", file.to_str().unwrap(), &format!("docker://{name}")],
    );
    assert!(options.auth.erase(&registry.host()).unwrap());
    assert!(matches!(client.pull(&second, &name, &Quiet), Err(RegistryError::Denied { .. })));
}

#[test]
fn tls_needs_an_authority_or_the_switch() {
    let (directory, store, image) = fixture();
    authority(directory.path());
    let registry = Registry::start(directory.path(), Kind::Tls);
    let mut options = options(directory.path());
    let name = reference(format!("{}/app:1", registry.host()));
    let refused = Client::new(options.clone()).push(&store, &image, &name, &Quiet);
    assert!(matches!(&refused, Err(RegistryError::Certificate { .. })), "{refused:?}");
    let certificates = directory.path().join("certs.d").join(registry.host());
    std::fs::create_dir_all(&certificates).unwrap();
    std::fs::copy(directory.path().join("ca.crt"), certificates.join("ca.crt")).unwrap();
    Client::new(options.clone()).push(&store, &image, &name, &Quiet).unwrap();
    std::fs::remove_dir_all(&certificates).unwrap();
    options.insecure.push(registry.host());
    let second = empty_store(directory.path(), "second");
    Client::new(options).pull(&second, &name, &Quiet).unwrap();
}

/// What a fault does to a pull, from a registry that has the image as `app:1`.
struct Spoiled {
    directory: tempfile::TempDir,
    registry: Registry,
    image: Image,
}

impl Spoiled {
    fn new() -> Self {
        let (directory, store, image) = fixture();
        let registry = Registry::start(directory.path(), Kind::Open);
        let client = Client::new(options(directory.path()));
        client.push(&store, &image, &reference(format!("{}/app:1", registry.host())), &Quiet).unwrap();
        Self { directory, registry, image }
    }

    fn pull(&self, proxy: &Proxy) -> (Store, Result<Image, RegistryError>) {
        let store = empty_store(tempfile::tempdir_in(self.directory.path()).unwrap().keep().as_path(), "s");
        let client = Client::new(options(self.directory.path()));
        let result = client.pull(&store, &reference(format!("{}/app:1", proxy.host())), &Quiet);
        match &result {
            Ok(image) => {
                assert_eq!(image.id(), self.image.id());
                for layer in &image.layers {
                    store.verify_layer(layer).unwrap();
                }
            }
            Err(_) => assert_empty(&store),
        }
        (store, result)
    }
}

#[test]
fn what_can_be_mended_is_mended() {
    let spoiled = Spoiled::new();
    let port = spoiled.registry.port;
    let large = spoiled.image.layers.iter().max_by_key(|layer| layer.size).unwrap();
    let blob = format!("/v2/app/blobs/{}", large.digest);
    let on_blob = |rule: fn(usize) -> Fault| {
        let blob = blob.clone();
        Proxy::start(port, move |seen, before| if seen.path == blob { rule(before) } else { Fault::None })
    };

    // Cut at several places: what is here is not asked for again.
    let proxy = on_blob(|before| match before {
        0 => Fault::Cut(1000),
        1 => Fault::Cut(50_000),
        2 => Fault::Close,
        _ => Fault::None,
    });
    spoiled.pull(&proxy).1.unwrap();
    let seen = proxy.seen.lock().unwrap();
    let ranges: Vec<_> =
        seen.iter().filter(|seen| seen.path == blob).map(|seen| seen.header("range").map(str::to_owned)).collect();
    assert_eq!(ranges.len(), 4);
    assert_eq!(ranges[0], None);
    assert!(
        ranges[1..].iter().all(|range| range.as_ref().is_some_and(|range| range.starts_with("bytes="))),
        "{ranges:?}"
    );
    drop(seen);

    // A registry whose ranges are not to be trusted is asked for all again.
    let proxy = on_blob(|before| if before == 0 { Fault::Cut(5000) } else { Fault::Without("content-range") });
    spoiled.pull(&proxy).1.unwrap();
    assert_eq!(proxy.count("GET", &blob), 3);
    let proxy = on_blob(|_| Fault::Slow);
    spoiled.pull(&proxy).1.unwrap();

    // Everything fails once, in its own way.
    for (status, headers) in [(429, "retry-after: 0\r\n"), (503, ""), (500, ""), (502, "retry-after: x\r\n")] {
        let proxy = Proxy::start(port, move |_, before| {
            if before == 0 { Fault::Answer(status, headers.to_owned(), b"no".to_vec()) } else { Fault::None }
        });
        spoiled.pull(&proxy).1.unwrap();
    }
    let proxy = Proxy::start(port, |_, before| if before == 0 { Fault::Close } else { Fault::None });
    spoiled.pull(&proxy).1.unwrap();
}

#[test]
fn what_can_not_be_mended_is_refused() {
    let spoiled = Spoiled::new();
    let port = spoiled.registry.port;
    let failure = |rule: fn(&faults::Seen) -> Fault| {
        let proxy = Proxy::start(port, move |seen, _| rule(seen));
        let (_, result) = spoiled.pull(&proxy);
        let mut error: &dyn std::error::Error = &result.unwrap_err();
        let mut text = error.to_string();
        while let Some(source) = error.source() {
            text.push_str(&format!(": {source}"));
            error = source;
        }
        (proxy, text)
    };
    let is_blob = |seen: &faults::Seen| seen.path.contains("/blobs/");
    // No end to it: given up after four attempts.
    let (proxy, text) = failure(|seen| {
        if seen.path.contains("/manifests/") { Fault::Answer(503, String::new(), Vec::new()) } else { Fault::None }
    });
    assert_eq!(proxy.count("GET", "/manifests/"), 4);
    assert!(text.contains("4 attempts"), "{text}");
    let (_, text) = failure(|seen| if seen.path.contains("/blobs/") { Fault::Cut(0) } else { Fault::None });
    assert!(text.contains("gave up"), "{text}");
    // Content that is not what was promised.
    let (_, text) = failure(|seen| {
        if seen.path.contains("/blobs/") {
            Fault::Body(|mut body| {
                if let Some(byte) = body.last_mut() {
                    *byte ^= 1;
                }
                body
            })
        } else {
            Fault::None
        }
    });
    assert!(text.contains("tampered"), "{text}");
    let (_, text) = failure(|seen| {
        if seen.path.contains("/blobs/") {
            Fault::Body(|mut body| {
                body.extend([0; 10]);
                body
            })
        } else {
            Fault::None
        }
    });
    assert!(text.contains("tampered"), "{text}");
    let (_, text) = failure(|seen| {
        if seen.path.contains("/manifests/") { Fault::Body(|body| [body, b" ".to_vec()].concat()) } else { Fault::None }
    });
    assert!(text.contains("has the digest"), "{text}");
    // A manifest without end, one that is no manifest, and one that lies about its kind.
    let (_, text) = failure(|seen| {
        if seen.path.contains("/manifests/") {
            Fault::Answer(200, String::new(), vec![b' '; 5 << 20])
        } else {
            Fault::None
        }
    });
    assert!(text.contains("the most that is accepted"), "{text}");
    let (_, text) = failure(|seen| {
        if seen.path.contains("/manifests/") {
            Fault::Answer(200, "content-type: text/html\r\n".to_owned(), b"{}".to_vec())
        } else {
            Fault::None
        }
    });
    assert!(text.contains("neither an image manifest nor an index"), "{text}");
    // Redirects in a circle.
    let (proxy, text) = failure(|seen| {
        if seen.path.contains("/blobs/") {
            Fault::Answer(307, format!("location: {}\r\n", seen.path), Vec::new())
        } else {
            Fault::None
        }
    });
    assert!(text.contains("too many"), "{text}");
    assert!(proxy.seen.lock().unwrap().iter().filter(|seen| is_blob(seen)).count() < 20);
    // An authentication that nobody knows.
    let (_, text) = failure(|seen| {
        if seen.path.contains("/manifests/") {
            Fault::Answer(401, "www-authenticate: Negotiate\r\n".to_owned(), Vec::new())
        } else {
            Fault::None
        }
    });
    assert!(text.contains("neither basic nor a token"), "{text}");
}

#[test]
fn credentials_do_not_follow_redirects() {
    let (directory, store, image) = fixture();
    let registry = Registry::start(directory.path(), Kind::Password);
    let options = options(directory.path());
    let credentials = Credentials::Password { user: "user".to_owned(), password: "secret".to_owned() };
    options.auth.store(&registry.host(), &credentials).unwrap();
    Client::new(options.clone())
        .push(&store, &image, &reference(format!("{}/app:1", registry.host())), &Quiet)
        .unwrap();
    // Storage elsewhere, which has the blobs and wants no credentials.
    let blobs = store.directory().join("blobs/sha256");
    let elsewhere = Proxy::start(0, move |seen, _| {
        match std::fs::read(blobs.join(seen.path.rsplit('/').next().unwrap_or_default())) {
            Ok(bytes) => Fault::Answer(200, String::new(), bytes),
            Err(_) => Fault::Answer(404, String::new(), Vec::new()),
        }
    });
    let target = format!("http://127.0.0.1:{}", elsewhere.port);
    let port = registry.port;
    let proxy = Proxy::start(port, move |seen, _| match seen.path.rsplit_once("sha256:") {
        Some((path, hex)) if path.contains("/blobs/") => {
            Fault::Answer(307, format!("location: {target}/{hex}\r\n"), Vec::new())
        }
        _ => Fault::None,
    });
    options.auth.store(&proxy.host(), &credentials).unwrap();
    let second = empty_store(directory.path(), "second");
    let name = reference(format!("{}/app:1", proxy.host()));
    Client::new(options).pull(&second, &name, &Quiet).unwrap();
    let seen = elsewhere.seen.lock().unwrap();
    assert!(seen.len() >= 3);
    assert!(seen.iter().all(|seen| seen.header("authorization").is_none()));
    assert!(proxy.seen.lock().unwrap().iter().any(|seen| seen.header("authorization").is_some()));
}

/// A registry that wants tokens, and the service that gives them, in one.
#[test]
fn tokens_are_fetched_and_renewed() {
    let spoiled = Spoiled::new();
    let port = spoiled.registry.port;
    let own = std::sync::Arc::new(std::sync::atomic::AtomicU16::new(0));
    let of_rule = own.clone();
    let proxy = Proxy::start(port, move |seen, before| {
        if seen.path.starts_with("/token?") {
            // Each has another token; the first is worth nothing from the beginning.
            let good =
                seen.path.contains("service=s%20t") && seen.header("authorization") == Some("Basic dXNlcjpzZWNyZXQ=");
            let token = if good && seen.path.contains("scope=repository%3Aapp%3Apull") && before > 0 {
                "good"
            } else {
                "stale"
            };
            return Fault::Answer(200, String::new(), format!(r#"{{"token":"{token}"}}"#).into_bytes());
        }
        if seen.header("authorization") == Some("Bearer good") {
            return Fault::None;
        }
        let port = of_rule.load(std::sync::atomic::Ordering::Relaxed);
        let challenge = format!(
            "www-authenticate: Bearer realm=\"http://localhost:{port}/token\",service=\"s t\",scope=\"repository:app:pull\"\r\n"
        );
        Fault::Answer(401, challenge, Vec::new())
    });
    own.store(proxy.port, std::sync::atomic::Ordering::Relaxed);
    let credentials = Credentials::Password { user: "user".to_owned(), password: "secret".to_owned() };
    options(spoiled.directory.path()).auth.store(&proxy.host(), &credentials).unwrap();
    spoiled.pull(&proxy).1.unwrap();
    assert_eq!(proxy.count("GET", "/token?"), 2);
    // Without credentials it gives none that is good.
    options(spoiled.directory.path()).auth.erase(&proxy.host()).unwrap();
    let (_, result) = spoiled.pull(&proxy);
    assert!(matches!(result, Err(RegistryError::Denied { .. })), "{result:?}");
}

#[test]
fn uploads_survive_what_can_be_survived() {
    let (directory, store, image) = fixture();
    let registry = Registry::start(directory.path(), Kind::Open);
    let proxy = Proxy::start(registry.port, |seen, before| match (seen.method.as_str(), before) {
        ("POST", 0) => Fault::Answer(503, String::new(), Vec::new()),
        ("HEAD", 0) => Fault::Close,
        ("PUT", 0) if seen.path.contains("/manifests/") => Fault::Answer(500, String::new(), Vec::new()),
        _ => Fault::None,
    });
    let client = Client::new(options(directory.path()));
    client.push(&store, &image, &reference(format!("{}/app:1", proxy.host())), &Quiet).unwrap();
    let second = empty_store(directory.path(), "second");
    client.pull(&second, &reference(format!("{}/app:1", registry.host())), &Quiet).unwrap();
    // A registry that stored something else than what it was sent.
    let wrong = Proxy::start(registry.port, |seen, _| {
        if seen.method == "PUT" && seen.path.contains("/manifests/") {
            let digest =
                "docker-content-digest: sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\r\n";
            return Fault::Answer(201, digest.to_owned(), Vec::new());
        }
        Fault::None
    });
    client.push(&store, &image, &reference(format!("{}/app:2", wrong.host())), &Quiet).unwrap_err();
}
