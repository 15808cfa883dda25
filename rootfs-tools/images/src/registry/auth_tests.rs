#![allow(clippy::unwrap_used)]
use std::os::unix::fs::PermissionsExt;

use super::*;

fn password(user: &str, password: &str) -> Credentials {
    Credentials::Password { user: user.to_owned(), password: password.to_owned() }
}

#[test]
fn credentials_are_kept_found_and_forgotten() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("new/config.json");
    let file = AuthFile::at(&path);
    assert_eq!(file.find("r.example:5000", "a/b").unwrap(), None);
    assert!(!file.erase("r.example:5000").unwrap());
    file.store("r.example:5000", &password("me", "a:b c")).unwrap();
    file.store("docker.io", &Credentials::IdentityToken("t".to_owned())).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(file.find("r.example:5000", "a/b").unwrap(), Some(password("me", "a:b c")));
    assert_eq!(file.find("docker.io", "library/x").unwrap(), Some(Credentials::IdentityToken("t".to_owned())));
    let written: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert!(written["auths"][DOCKER_KEY].is_object());
    assert!(file.erase("r.example:5000").unwrap());
    assert_eq!(file.find("r.example:5000", "").unwrap(), None);
    assert!(file.find("docker.io", "").unwrap().is_some());
}

#[test]
fn what_others_wrote_is_understood_and_kept() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.json");
    let both = BASE64.encode("u:p");
    let special = BASE64.encode("special:p");
    let config = json!({ "HttpHeaders": { "x": "y" }, "auths": { "https://r.example/v1/": { "auth": both }, "r.example/team": { "auth": special }, "empty.example": {} } });
    fs::write(&path, config.to_string()).unwrap();
    let file = AuthFile::at(&path);
    assert_eq!(file.find("r.example", "x").unwrap(), Some(password("u", "p")));
    assert_eq!(file.find("r.example", "team/app").unwrap(), Some(password("special", "p")));
    assert_eq!(file.find("empty.example", "x").unwrap(), None);
    file.store("new.example", &password("a", "b")).unwrap();
    let written: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert_eq!(written["HttpHeaders"]["x"], "y");
    for malformed in
        ["{", "[]", r#"{"auths":{"r.example":{"auth":"%%%"}}}"#, r#"{"auths":{"r.example":{"auth":"eA=="}}}"#]
    {
        fs::write(&path, malformed).unwrap();
        assert!(matches!(file.find("r.example", ""), Err(AuthError::Malformed { .. })), "{malformed}");
    }
    fs::write(&path, "").unwrap();
    assert_eq!(file.find("r.example", "").unwrap(), None);
    fs::write(&path, r#"{"credsStore":"../../bin/sh"}"#).unwrap();
    assert!(matches!(file.find("r.example", ""), Err(AuthError::Helper { .. })));
}
