//! Whole builds: compared file by file and setting by setting with what buildah makes, and the cache, parallel stages,
//! reproducibility and errors. RUN steps run in a stand-in for the guest here; the real guest has its own tests.
mod common;

use caisson_build::Options;
use common::{World, buildah, listing, sh};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::Ordering;

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

/// A context with a bit of everything.
fn context(world: &World, dockerfile: &str) -> std::path::PathBuf {
    let root = world.directory.path().join("context");
    let _ = fs::remove_dir_all(&root);
    write(&root.join("Dockerfile"), dockerfile);
    write(&root.join("src/main.c"), "int main;\n");
    write(&root.join("src/lib/a.h"), "a\n");
    write(&root.join("src/lib/b.h"), "b\n");
    write(&root.join("notes.md"), "notes\n");
    write(&root.join("tool"), "#!/bin/sh\necho tool\n");
    fs::set_permissions(root.join("tool"), fs::Permissions::from_mode(0o751)).unwrap();
    fs::set_permissions(root.join("src/lib"), fs::Permissions::from_mode(0o711)).unwrap();
    symlink("main.c", root.join("src/link")).unwrap();
    write(&root.join("skipped/x.o"), "o");
    write(&root.join(".dockerignore"), "**/*.o\n");
    sh(&format!(
        "cd '{0}'; mkdir t; mkdir -m 700 t/in; echo deep > t/in/f; chown -R 12:34 t/in; touch -d @1600000000 t/in t/in/f
         tar -C t -czf a.tar.gz in; rm -r t; find . -exec touch -h -d @1600000000 {{}} +",
        root.display()
    ));
    root
}

/// What of a configuration must be the same; times and the builder's name are not.
fn settings(config: &Value) -> Value {
    let mut inner = config["config"].clone();
    let object = inner.as_object_mut().unwrap();
    for key in [
        "Hostname",
        "Domainname",
        "Image",
        "AttachStdin",
        "AttachStdout",
        "AttachStderr",
        "Tty",
        "OpenStdin",
        "StdinOnce",
    ] {
        object.remove(key);
    }
    if let Some(labels) = object.get_mut("Labels").and_then(Value::as_object_mut) {
        labels.remove("io.buildah.version");
    }
    let empty = [Value::Null, serde_json::json!(""), serde_json::json!([]), serde_json::json!({})];
    object.retain(|_, value| !empty.contains(value));
    inner
}

fn compare(dockerfile: &str, extra: &str, options: &Options) {
    let world = World::new();
    let context = context(&world, dockerfile);
    let image = world.build(&context, options).unwrap_or_else(|error| panic!("{}", chain(&error)));
    let ours = listing(&world.unpack(&image, "ours"));
    let (root, config) = buildah(&world, &context, extra);
    let theirs = listing(&root);
    let only =
        |one: &[String], other: &[String]| one.iter().filter(|line| !other.contains(line)).cloned().collect::<Vec<_>>();
    assert_eq!((only(&ours, &theirs), only(&theirs, &ours)), (vec![], vec![]), "only ours, only buildah's");
    let own: Value = serde_json::from_slice(&image.config_json).unwrap();
    assert_eq!(settings(&own), settings(&config));
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text += &format!(": {cause}");
        next = cause.source();
    }
    text
}

#[test]
fn copies_and_settings_are_as_buildah_makes_them() {
    compare(
        r#"
ARG TAG=latest
FROM localhost/base:$TAG AS one
ARG WHO=alice
ENV A=1 B="two words" C=${A}3
ENV OLD style value
COPY src /src
COPY src/lib/*.h /headers/
COPY notes.md tool /many/
COPY src/link /followed
COPY --chown=$WHO:wheel src /owned/src
COPY --chown=7 --chmod=640 notes.md /owned/seven
ADD a.tar.gz /unpacked
ADD notes.md /added/${OLD%% *}.md
COPY notes.md data/relative
WORKDIR /made/here
COPY tool .
USER alice
WORKDIR sub
FROM one
COPY --from=one /src/main.c /src/lib /from/
COPY --from=one /owned /from/owned
LABEL "some key"="a value" other=x\ y
EXPOSE 80 9000-9002/udp
VOLUME /v1 /v2
VOLUME ["/v 3"]
STOPSIGNAL SIGINT
SHELL ["/bin/sh", "-eu", "-c"]
HEALTHCHECK --interval=5s --retries=2 CMD test -e /src
MAINTAINER someone
CMD ["run", "it"]
ENTRYPOINT exec start $A
ONBUILD COPY . /onbuild
"#,
        "",
        &Options::default(),
    );
}

#[test]
fn runs_are_as_buildah_makes_them() {
    let mut options = Options::default();
    options.build_args.insert("WHAT".into(), "given".into());
    compare(
        r#"
FROM localhost/base AS build
ARG WHAT=default
ENV X=env
RUN echo "$WHAT $X" > /result; touch -d @1500000000 /result; mkdir -p /out/d; ln /result /out/hard; ln -s ../result /out/soft
RUN ["sh", "-c", "rm /data/kept; rm -r /data/opaque; mkdir /data/opaque; echo n > /data/opaque/n; touch -d @1500000000 /data/opaque/n"]
RUN cp /result /out/copy && chown 5:6 /out/copy && chmod 4711 /out/copy && touch -d @1500000000 /out/copy && rm /out/soft
FROM localhost/base
COPY --from=build /out /out
RUN ls /out > /listing; touch -d @1500000000 /listing
"#,
        "--build-arg WHAT=given",
        &options,
    );
}

#[test]
fn a_rebuild_runs_nothing_and_makes_the_same_image() {
    let world = World::new();
    let dockerfile = "FROM localhost/base AS a\nRUN echo 1 > /one\nCOPY src /src\nRUN cat /src/main.c > /two\nWORKDIR /w\nFROM localhost/base\nCOPY --from=a /two /two\nENV X=1\n";
    let root = context(&world, dockerfile);
    let first = world.build(&root, &Options::default()).unwrap();
    assert_eq!(world.runs.load(Ordering::SeqCst), 2);
    let again = world.build(&root, &Options::default()).unwrap();
    assert_eq!(world.runs.load(Ordering::SeqCst), 2);
    assert_eq!(first.id(), again.id());
    // A new time is not a new content.
    sh(&format!("touch '{}'", root.join("src/main.c").display()));
    assert_eq!(world.build(&root, &Options::default()).unwrap().id(), first.id());
    // A new content is, from where it counts on.
    write(&root.join("src/main.c"), "changed\n");
    let changed = world.build(&root, &Options::default()).unwrap();
    assert_eq!(world.runs.load(Ordering::SeqCst), 3);
    assert_ne!(changed.id(), first.id());
    // What is pinned outlives the images.
    for image in [&first, &changed] {
        let _ = world.store.remove(&image.id().to_string(), true);
    }
    world.store.prune().unwrap();
    world.build(&root, &Options::default()).unwrap();
    assert_eq!(world.runs.load(Ordering::SeqCst), 3);
    let options = Options { no_cache: true, ..Options::default() };
    world.build(&root, &options).unwrap();
    assert_eq!(world.runs.load(Ordering::SeqCst), 5);
    let pruned = world.cache.prune(std::time::Duration::ZERO).unwrap();
    assert!(pruned.records >= 5, "{pruned:?}");
    world.build(&root, &Options::default()).unwrap();
    assert_eq!(world.runs.load(Ordering::SeqCst), 7);
}

#[test]
fn a_layer_holds_the_change_set_only() {
    let world = World::new();
    let root = context(
        &world,
        "FROM localhost/base\nRUN echo x > /data/new && rm /data/kept\nRUN true\nCOPY notes.md /data/\n",
    );
    let base = world.store.resolve(common::BASE).unwrap().layers.len();
    let image = world.build(&root, &Options::default()).unwrap();
    assert_eq!(image.layers.len(), base + 2, "a step that changes nothing makes no layer");
    let names = |index: usize| {
        sh(&format!("tar -tf '{}'", world.store.blob_path(&image.layers[base + index].digest).display()))
    };
    assert_eq!(names(0), "data/\ndata/.wh.kept\ndata/new\n");
    assert_eq!(names(1), "data/\ndata/notes.md\n");
}

#[test]
fn an_epoch_makes_images_reproducible() {
    let options = Options { source_date_epoch: Some(1_600_000_001), no_cache: true, ..Options::default() };
    let dockerfile = "FROM localhost/base\nRUN mkdir /d && echo x > /d/f\nCOPY src /new/src\nWORKDIR /w\nENV A=1\n";
    let ids: Vec<_> = (0..2)
        .map(|_| {
            let world = World::new();
            let root = context(&world, dockerfile);
            let image = world.build(&root, &options).unwrap();
            let newest =
                sh(&format!("cd '{}'; find d w new -newermt @1600000001", world.unpack(&image, "out").display()));
            assert_eq!(newest, "");
            image.layers.iter().rev().take(3).map(|layer| layer.diff_id).collect::<Vec<_>>()
        })
        .collect();
    assert_eq!(ids[0], ids[1]);
}

#[test]
fn mounts_heredocs_and_secrets() {
    let world = World::new();
    let root = context(
        &world,
        r##"FROM localhost/base AS src
COPY notes.md /from-stage
FROM localhost/base
RUN --mount=type=cache,target=/cache,id=c echo first >> /cache/log
RUN --mount=type=cache,target=/cache,id=c --mount=type=tmpfs,target=/scratch cat /cache/log > /seen; echo t > /scratch/t
RUN --mount=type=bind,target=/ctx --mount=type=bind,from=src,source=/from-stage,target=/one cat /ctx/src/main.c /one > /bound
RUN --mount=type=secret,id=token cat /run/secrets/token | tr a-z A-Z > /upper; ls -l /run/secrets/token > /mode
RUN <<EOF
set -e
X=script
echo "$X 1" > /script
EOF
RUN <<EOF cat > /piped
piped $PATH
EOF
RUN <<'EOF'
#!/bin/cat
shebang
EOF
COPY <<FILE /heredoc
path is $PATH
FILE
"##,
    );
    let mut options = Options::default();
    options.secrets.insert("token".into(), b"hush".to_vec());
    let image = world.build(&root, &options).unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert!(world.made().iter().any(|line| line.contains("#!/bin/cat\nshebang\n")), "{:?}", world.made());
    let out = world.unpack(&image, "out");
    let read = |name: &str| fs::read_to_string(out.join(name)).unwrap();
    assert_eq!(read("seen"), "first\n");
    assert_eq!(read("bound"), "int main;\nnotes\n");
    assert_eq!(read("upper"), "HUSH");
    assert!(read("mode").starts_with("-r--------"));
    assert_eq!(read("script"), "script 1\n");
    assert_eq!(read("piped"), "piped /bin\n");
    assert_eq!(read("heredoc"), "path is /bin\n");
    for left in ["cache", "scratch", "ctx", "one", "run/secrets", "dev/null", "dev/pipes"] {
        assert!(!out.join(left).exists(), "{left}");
    }
}

#[test]
fn targets_triggers_and_unneeded_stages() {
    let world = World::new();
    let root = context(&world, "FROM localhost/base\nONBUILD COPY notes.md /triggered\nONBUILD RUN echo $0 > /ran\n");
    let image = world.build(&root, &Options::default()).unwrap();
    world.store.tag(&image.id().to_string(), &"localhost/onbuild:1".parse().unwrap()).unwrap();
    let root = context(
        &world,
        "FROM localhost/nothing AS unneeded\nRUN false\nFROM localhost/onbuild:1 AS wanted\nFROM scratch\nCOPY --from=unneeded / /\n",
    );
    let options = Options { target: Some("wanted".into()), ..Options::default() };
    let image = world.build(&root, &options).unwrap();
    let out = world.unpack(&image, "out");
    assert_eq!(fs::read_to_string(out.join("triggered")).unwrap(), "notes\n");
    assert!(out.join("ran").exists());
    let error = world.build(&root, &Options::default()).unwrap_err();
    assert!(chain(&error).contains("localhost/nothing"), "{}", chain(&error));
}

#[test]
fn errors_point_at_the_line() {
    let world = World::new();
    for (dockerfile, expected) in [
        (
            "FROM localhost/base\n\nCOPY nothing /x\n",
            "Dockerfile:3: this step failed\n  3 | COPY nothing /x: nothing is not in the build context",
        ),
        ("FROM localhost/base\nRUN exit 3\n", "RUN exit 3: exit code 3"),
        ("FROM localhost/base\nCOPY --chown=nobody notes.md /\n", "is not in the image's etc/passwd"),
        ("FROM localhost/base\nADD https://example.invalid/x /x\n", "not downloaded here"),
        ("FROM scratch\nRUN x\n", "no program to run"),
        ("FROM localhost/base\nENV A=${B:?missing}\n", "Dockerfile:2"),
        ("FROM localhost/base\nRUN --mount=type=secret,id=s,required=true true\n", "the secret s is required"),
        ("FROM localhost/base\nCOPY skipped/x.o /\n", ".dockerignore"),
        ("FROM localhost/base\nSTOPSIGNAL what\n", "not a signal"),
        ("FROM localhost/base\nEXPOSE 99999\n", "not a port"),
    ] {
        let root = context(&world, dockerfile);
        let error = chain(&world.build(&root, &Options::default()).unwrap_err());
        assert!(error.contains(expected), "{error}");
    }
}
