#![allow(clippy::unwrap_used)]
use super::*;

fn text(content: &str) -> Node {
    let bytes = Content::Bytes(content.as_bytes().into());
    Node { kind: Kind::File { size: content.len() as u64, content: bytes }, ..Node::directory(0o644) }
}

fn symlink(target: &str) -> Node {
    Node { kind: Kind::Symlink(target.into()), ..Node::directory(0o777) }
}

fn view(nodes: Vec<(&str, Node)>) -> View {
    let mut changes = Changes::default();
    for (path, node) in nodes {
        changes.added.insert(path.into(), Arc::new(node));
    }
    let mut view = View::default();
    view.apply(&changes);
    view
}

fn source() -> View {
    view(vec![
        ("d", Node::directory(0o700)),
        ("d/x", text("x")),
        ("d/y", symlink("x")),
        ("d/sub", Node::directory(0o711)),
        ("d/sub/z.o", text("z")),
        ("f", text("f")),
        ("link", symlink("f")),
        ("dlink", symlink("d")),
        ("out", symlink("../../../etc")),
    ])
}

#[derive(Default)]
struct Options {
    link: bool,
    parents: bool,
    owner: Option<(u32, u32)>,
    mode: Option<u32>,
    exclude: Ignore,
}

fn run(base: &View, sources: &[&str], destination: &str, options: &Options) -> Result<Vec<String>, CopyError> {
    let tree = source();
    let mut found = Vec::new();
    for one in sources {
        found.push(Source::Tree(&tree, select(&tree, "the build context", one)?));
    }
    let request = Request {
        sources: found,
        destination,
        workdir: Path::new("/work"),
        owner: options.owner,
        mode: options.mode,
        unpack: false,
        link: options.link,
        parents: options.parents,
        exclude: &options.exclude,
        now_s: 1,
        scratch: Path::new("/tmp"),
    };
    let changes = copy(base, &request)?;
    Ok(changes
        .added
        .iter()
        .map(|(path, node)| {
            let kind = match &node.kind {
                Kind::Directory => "/".to_owned(),
                Kind::Symlink(target) => format!(" -> {}", target.display()),
                _ => String::new(),
            };
            format!("{}{kind} {:o} {}:{}", path.display(), node.mode, node.uid, node.gid)
        })
        .collect())
}

#[test]
fn files_and_directories() {
    let empty = View::default();
    let options = Options::default();
    assert_eq!(run(&empty, &["f"], "/a/b", &options).unwrap(), ["a/ 755 0:0", "a/b 644 0:0"]);
    assert_eq!(run(&empty, &["f"], "/a/", &options).unwrap(), ["a/ 755 0:0", "a/f 644 0:0"]);
    assert_eq!(run(&empty, &["link"], "b", &options).unwrap(), ["work/ 755 0:0", "work/b 644 0:0"]);
    assert_eq!(run(&empty, &["link"], ".", &options).unwrap(), ["work/ 755 0:0", "work/link 644 0:0"]);
    let all = ["a/ 755 0:0", "a/sub/ 711 0:0", "a/sub/z.o 644 0:0", "a/x 644 0:0", "a/y -> x 777 0:0"];
    assert_eq!(run(&empty, &["d"], "/a", &options).unwrap(), all);
    assert_eq!(run(&empty, &["dlink/"], "/a", &options).unwrap(), all);
    assert_eq!(
        run(&empty, &["d/*.o", "d/s*/*"], "/a/", &options).unwrap_err().to_string(),
        "d/*.o is not in the build context: check its spelling, and .dockerignore"
    );
    assert_eq!(run(&empty, &["d/s*/*.o"], "/a/", &options).unwrap(), ["a/ 755 0:0", "a/z.o 644 0:0"]);
    assert!(run(&empty, &["out/passwd"], "/a", &options).is_err());
    assert!(matches!(run(&empty, &["f", "link"], "/a", &options), Err(CopyError::NeedsDirectory { .. })));
}

#[test]
fn flags() {
    let empty = View::default();
    let options = Options { owner: Some((5, 6)), mode: Some(0o400), ..Options::default() };
    assert_eq!(run(&empty, &["f"], "/a/b", &options).unwrap(), ["a/ 755 5:6", "a/b 400 5:6"]);
    let options = Options { parents: true, ..Options::default() };
    assert_eq!(
        run(&empty, &["d/sub/z.o"], "/a/", &options).unwrap(),
        ["a/ 755 0:0", "a/d/ 755 0:0", "a/d/sub/ 755 0:0", "a/d/sub/z.o 644 0:0"]
    );
    let options = Options { exclude: Ignore::new(["**/*.o", "y"]).unwrap(), ..Options::default() };
    assert_eq!(run(&empty, &["d"], "/a", &options).unwrap(), ["a/ 755 0:0", "a/sub/ 711 0:0", "a/x 644 0:0"]);
}

#[test]
fn destinations_resolve_in_the_image() {
    let base = view(vec![
        ("usr", Node { mode: 0o750, uid: 9, ..Node::directory(0) }),
        ("usr/lib", Node::directory(0o755)),
        ("lib", symlink("usr/lib")),
        ("file", text("")),
        ("etc", Node::directory(0o755)),
    ]);
    let options = Options::default();
    // Existing directories keep what they have, and are in the layer, or their attributes would be hidden.
    assert_eq!(
        run(&base, &["f"], "/lib", &options).unwrap(),
        ["usr/ 750 9:0", "usr/lib/ 755 0:0", "usr/lib/f 644 0:0"]
    );
    assert_eq!(run(&base, &["f"], "/lib/../f", &options).unwrap(), ["usr/ 750 9:0", "usr/f 644 0:0"]);
    assert!(matches!(run(&base, &["d"], "/file", &options), Err(CopyError::Kind { .. })));
    assert!(matches!(run(&base, &["f"], "/file/", &options), Err(CopyError::Kind { .. })));
    let options = Options { link: true, ..Options::default() };
    assert_eq!(run(&base, &["f"], "/lib/f", &options).unwrap(), ["lib/ 755 0:0", "lib/f 644 0:0"]);
}

#[test]
fn hard_links_stay_together() {
    let mut tree = View::default();
    let node = Arc::new(text("same"));
    tree.insert(Path::new("d"), &Arc::new(Node::directory(0o755)));
    tree.insert(Path::new("d/a"), &node);
    tree.insert(Path::new("d/b"), &node);
    let exclude = Ignore::default();
    let request = Request {
        sources: vec![Source::Tree(&tree, select(&tree, "", "d").unwrap())],
        destination: "/",
        workdir: Path::new("/"),
        owner: None,
        mode: None,
        unpack: false,
        link: false,
        parents: false,
        exclude: &exclude,
        now_s: 0,
        scratch: Path::new("/tmp"),
    };
    let changes = copy(&View::default(), &request).unwrap();
    assert!(Arc::ptr_eq(&changes.added[Path::new("a")], &changes.added[Path::new("b")]));
}

#[test]
fn archives_are_unpacked() {
    let mut inner = Changes::default();
    inner.added.insert("p".into(), Arc::new(Node { uid: 3, ..Node::directory(0o750) }));
    inner.added.insert("p/q".into(), Arc::new(Node { uid: 4, ..text("q") }));
    let mut tar = Vec::new();
    layer::write(&inner, None, &mut tar).unwrap();
    let archive = Content::Bytes(zstd::encode_all(tar.as_slice(), 1).unwrap().into());
    let Content::Bytes(bytes) = &archive else { unreachable!() };
    let size = bytes.len() as u64;
    let plain = zstd::encode_all(b"text".as_slice(), 1).unwrap();
    let plain = Kind::File { size: plain.len() as u64, content: Content::Bytes(plain.into()) };
    let tree = view(vec![
        ("a.tar.zst", Node { kind: Kind::File { size, content: archive }, ..Node::directory(0o644) }),
        ("text.zst", Node { kind: plain, ..Node::directory(0o644) }),
    ]);
    let exclude = Ignore::default();
    let scratch = tempfile::tempdir().unwrap();
    let request = Request {
        sources: vec![Source::Tree(&tree, select(&tree, "", "*.zst").unwrap())],
        destination: "/to/",
        workdir: Path::new("/"),
        owner: None,
        mode: None,
        unpack: true,
        link: false,
        parents: false,
        exclude: &exclude,
        now_s: 0,
        scratch: scratch.path(),
    };
    let changes = copy(&View::default(), &request).unwrap();
    let paths: Vec<_> = changes.added.keys().map(|path| path.to_str().unwrap()).collect();
    assert_eq!(paths, ["to", "to/p", "to/p/q", "to/text.zst"]);
    let directory = &changes.added[Path::new("to/p")];
    assert_eq!((directory.mode, directory.uid), (0o750, 3));
}

#[test]
fn workdir_belongs_to_the_user() {
    let base = view(vec![("srv", Node::directory(0o755)), ("s", symlink("srv"))]);
    let changes = make_directory(&base, Path::new("/s/a/b"), (7, 8), 1).unwrap();
    let list: Vec<_> =
        changes.added.iter().map(|(path, node)| format!("{} {}:{}", path.display(), node.uid, node.gid)).collect();
    assert_eq!(list, ["srv 0:0", "srv/a 0:0", "srv/a/b 7:8"]);
    assert!(make_directory(&base, Path::new("/s"), (7, 8), 1).unwrap().is_empty());
}

#[test]
fn hashes_see_content_and_not_time() {
    let digest = |node: Node| {
        let tree = view(vec![("f", node)]);
        let mut hasher = Sha256::new();
        hash(&tree, &select(&tree, "", "f").unwrap(), &Ignore::default(), &mut hasher).unwrap();
        hasher.finalize()
    };
    let first = digest(text("a"));
    assert_eq!(first, digest(Node { mtime_s: 99, ..text("a") }));
    assert_ne!(first, digest(text("b")));
    assert_ne!(first, digest(Node { mode: 0o600, ..text("a") }));
}
