#![allow(clippy::unwrap_used)]
use super::*;

fn link(target: &str) -> Arc<Node> {
    Arc::new(Node { kind: Kind::Symlink(target.into()), ..Node::directory(0o777) })
}

fn directory() -> Arc<Node> {
    Arc::new(Node::directory(0o755))
}

fn file(text: &str) -> Arc<Node> {
    let content = Content::Bytes(text.as_bytes().into());
    Arc::new(Node { kind: Kind::File { size: text.len() as u64, content }, ..Node::directory(0o644) })
}

fn changes(added: &[(&str, Arc<Node>)], removed: &[&str], opaque: &[&str]) -> Changes {
    Changes {
        added: added.iter().map(|(path, node)| (path.into(), Arc::clone(node))).collect(),
        removed: removed.iter().map(PathBuf::from).collect(),
        opaque: opaque.iter().map(PathBuf::from).collect(),
    }
}

fn paths(view: &View) -> Vec<&str> {
    view.below(Path::new("")).map(|(path, _)| path.to_str().unwrap()).collect()
}

#[test]
fn layers_stack() {
    let mut view = View::default();
    view.apply(&changes(
        &[("a", directory()), ("a/x", file("1")), ("a.b", file("2")), ("o", directory()), ("o/p", file("3"))],
        &[],
        &[],
    ));
    assert_eq!(paths(&view), ["a", "a/x", "a.b", "o", "o/p"]);
    assert_eq!(view.names(Path::new("")), ["a", "a.b", "o"]);
    view.apply(&changes(&[("o", directory()), ("o/q", file("4"))], &["a/x"], &["o"]));
    assert_eq!(paths(&view), ["a", "a.b", "o", "o/q"]);
    view.apply(&changes(&[("o", file("now a file"))], &["a"], &[]));
    assert_eq!(paths(&view), ["a.b", "o"]);
}

#[test]
fn links_stay_inside() {
    let mut view = View::default();
    view.apply(&changes(
        &[
            ("usr", directory()),
            ("usr/lib", directory()),
            ("usr/lib/f", file("")),
            ("lib", link("usr/lib")),
            ("abs", link("/lib/./f")),
            ("up", link("../../../../usr")),
            ("loop", link("loop")),
        ],
        &[],
        &[],
    ));
    let resolve = |path: &str| view.resolve(Path::new(path)).map(|path| path.to_str().unwrap().to_owned());
    assert_eq!(resolve("/lib/f").as_deref(), Ok("usr/lib/f"));
    assert_eq!(resolve("abs").as_deref(), Ok("usr/lib/f"));
    assert_eq!(resolve("up/lib").as_deref(), Ok("usr/lib"));
    assert_eq!(resolve("lib/../x/new").as_deref(), Ok("usr/x/new"));
    assert_eq!(resolve("../..").as_deref(), Ok(""));
    assert!(resolve("loop/x").is_err());
    assert_eq!(view.resolve_parent(Path::new("lib/../../abs")).unwrap(), Path::new("abs"));
}

#[test]
fn runs_have_zeros_between() {
    use std::io::{Read, Write};
    let mut image = tempfile::tempfile().unwrap();
    image.write_all(b"0123456789").unwrap();
    let runs = [Run { logical: 2, physical: 5, length: 3 }, Run { logical: 7, physical: 0, length: 4 }];
    let content = Content::Runs { file: Arc::new(image), runs: runs.into() };
    let mut bytes = Vec::new();
    content.open(10).unwrap().read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"\0\x00567\0\x00012");
}
