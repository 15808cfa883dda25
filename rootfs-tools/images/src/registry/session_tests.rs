#![allow(clippy::unwrap_used)]
use super::*;

fn leads(url: &str, target: &str) -> Option<String> {
    let response = http::Response::builder().header(header::LOCATION, target);
    location(url, &response.body(Body::builder().data(Vec::new())).unwrap()).ok()
}

#[test]
fn locations_are_resolved() {
    let url = "https://r.example:5000/v2/a/blobs/uploads/?x=/y";
    for (target, expected) in [
        ("https://other.example/x?sig=1", Some("https://other.example/x?sig=1")),
        ("/v2/x?_state=1", Some("https://r.example:5000/v2/x?_state=1")),
        ("//cdn.example/x", Some("https://cdn.example/x")),
        ("next", Some("https://r.example:5000/v2/a/blobs/uploads/next")),
        ("http://", None),
        ("https://exa mple/", None),
    ] {
        assert_eq!(leads(url, target).as_deref(), expected, "{target}");
    }
    assert_eq!(leads("https://r.example", "x").as_deref(), Some("https://r.example/x"));
}

#[test]
fn origins_are_compared_whole() {
    assert!(same_origin("https://R.example/x", "https://r.example:443"));
    for other in [
        "http://r.example",
        "https://r.example:444",
        "https://r.example.evil.example",
        "https://r.example@evil.example",
        "nonsense",
    ] {
        assert!(!same_origin(other, "https://r.example"), "{other}");
    }
}

#[test]
fn loopback_is_recognised() {
    for host in ["localhost", "localhost:5000", "127.0.0.1:80", "127.9.9.9", "[::1]:5000"] {
        assert!(is_loopback(host), "{host}");
    }
    for host in ["localhost.example", "128.0.0.1", "[::2]", "r.example:127"] {
        assert!(!is_loopback(host), "{host}");
    }
}

#[test]
fn errors_are_shown_without_control_characters() {
    let body = br#"{"errors":[{"code":"DENIED","message":"no\u001b[31m way"}]}"#;
    assert_eq!(detail(body), ": DENIED: no[31m way");
    assert_eq!(detail(b"<html>"), "");
    assert_eq!(detail(br#"{"errors":[]}"#), "");
    assert_eq!(encode("repository:a/b:pull,push x"), "repository%3Aa%2Fb%3Apull%2Cpush%20x");
}
