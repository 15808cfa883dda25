#![allow(clippy::unwrap_used)]
use proptest::prelude::*;

use super::*;

const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

#[test]
fn names_are_completed_as_docker_does() {
    for (text, full, familiar) in [
        ("busybox", "docker.io/library/busybox:latest", "busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36", "busybox:1.36"),
        ("docker.io/busybox", "docker.io/library/busybox:latest", "busybox:latest"),
        ("index.docker.io/library/busybox", "docker.io/library/busybox:latest", "busybox:latest"),
        ("user/app", "docker.io/user/app:latest", "user/app:latest"),
        ("localhost/app", "localhost/app:latest", "localhost/app:latest"),
        (
            "localhost:5000/a/b__c.d---e:T_1.x-y",
            "localhost:5000/a/b__c.d---e:T_1.x-y",
            "localhost:5000/a/b__c.d---e:T_1.x-y",
        ),
        ("[::1]:5000/app", "[::1]:5000/app:latest", "[::1]:5000/app:latest"),
        ("Registry/app", "Registry/app:latest", "Registry/app:latest"),
    ] {
        let reference: Reference = text.parse().unwrap();
        assert_eq!(reference.to_string(), full);
        assert_eq!(reference.familiar(), familiar);
    }
    let reference: Reference = format!("quay.example/app@{DIGEST}").parse().unwrap();
    assert_eq!(reference.tag(), None);
    assert_eq!(reference.tag_or_digest(), DIGEST);
    let reference: Reference = format!("quay.example/app:1@{DIGEST}").parse().unwrap();
    assert_eq!(reference.tag(), Some("1"));
    assert_eq!(reference.to_string(), format!("quay.example/app:1@{DIGEST}"));
}

#[test]
fn what_is_no_reference_is_refused() {
    let long = "a".repeat(300);
    for text in [
        "",
        ":tag",
        "@",
        "App",
        "a//b",
        "/a",
        "a/",
        "a:",
        "a:-x",
        "a:b:c",
        "a@sha256:12",
        "a@md5:12",
        "a..b",
        "a___b",
        "-a",
        "a-",
        "a b",
        "a\n",
        "host.example:70000/a",
        "host.example:/a",
        "ho_st.example/a",
        "[::1/a",
        "[zz]:1/a",
        "../etc",
        "a/../b",
        "é",
        &long,
    ] {
        assert!(text.parse::<Reference>().is_err(), "{text:?}");
    }
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in ".{0,300}") {
        if let Ok(reference) = text.parse::<Reference>() {
            prop_assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
        }
    }

    #[test]
    fn what_is_shown_reads_the_same(text in "([a-z]{1,5}\\.[a-z]{2}(:[1-9][0-9]{0,3})?/)?[a-z0-9]{1,4}([_-][a-z0-9]{1,4}){0,2}(/[a-z0-9]{1,4}){0,2}(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,8})?") {
        let reference: Reference = text.parse().unwrap();
        prop_assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference.clone());
        prop_assert_eq!(reference.familiar().parse::<Reference>().unwrap(), reference);
    }
}
