use super::*;
use proptest::prelude::*;

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:Web,,,:/var/www:/usr/sbin/nologin\n\
    broken\nbad:x:many:0::/:\n1000:x:77:78::/home/number:\nhomeless:x:5:6\n";
const GROUP: &str = "root:x:0:\nwww:x:34:\nadm:x:4:syslog,web\nstaff:x:50:web\nx::notanumber:web\n";

fn who(user: &str) -> Result<Identity> {
    resolve(&User::Name(user.to_string()), |path| Ok(if path == "/etc/passwd" { PASSWD } else { GROUP }.to_string()))
}

fn identity(uid: u32, gid: u32, groups: &[u32], home: &str) -> Identity {
    Identity { uid, gid, groups: groups.to_vec(), umask: None, home: home.to_string() }
}

#[test]
fn names_and_numbers_are_found() {
    assert_eq!(who("").unwrap(), identity(0, 0, &[], "/root"));
    assert_eq!(who("root").unwrap(), identity(0, 0, &[], "/root"));
    assert_eq!(who("web").unwrap(), identity(33, 34, &[4, 50], "/var/www"));
    assert_eq!(who("33").unwrap(), identity(33, 34, &[4, 50], "/var/www"));
    assert_eq!(who("web:adm").unwrap(), identity(33, 4, &[], "/var/www"));
    assert_eq!(who("web:77").unwrap(), identity(33, 77, &[], "/var/www"));
    assert_eq!(who("web:").unwrap(), identity(33, 34, &[4, 50], "/var/www"));
    assert_eq!(who(":adm").unwrap(), identity(0, 4, &[], "/root"));
    assert_eq!(who("4711").unwrap(), identity(4711, 0, &[], "/"));
    assert_eq!(who("4711:4712").unwrap(), identity(4711, 4712, &[], "/"));
    assert_eq!(who("1000").unwrap(), identity(77, 78, &[], "/home/number"));
    assert_eq!(who("homeless").unwrap(), identity(5, 6, &[], "/"));
}

#[test]
fn unknown_names_are_refused() {
    for user in ["nobody", "bad", "web:nogroup", "-1", "4294967296", "web:x"] {
        assert_eq!(who(user).unwrap_err().kind, ErrorKind::Invalid, "{user}");
    }
}

#[test]
fn ids_are_taken_as_they_are() {
    let user = User::Ids { uid: 33, gid: 1, additional_gids: vec![2, 3], umask: Some(0o27) };
    let got = resolve(&user, |_| Ok(PASSWD.to_string())).unwrap();
    assert_eq!(got, Identity { umask: Some(0o27), ..identity(33, 1, &[2, 3], "/var/www") });
}

#[test]
fn without_databases_numbers_still_work() {
    let none = |_: &str| Ok(String::new());
    assert_eq!(resolve(&User::Name("1:2".into()), none).unwrap(), identity(1, 2, &[], "/"));
    assert_eq!(resolve(&User::Name(String::new()), none).unwrap(), identity(0, 0, &[], "/"));
    assert!(resolve(&User::Name("root".into()), none).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn hostile_databases_do_no_harm(text in "[a-z0-9:,\n]{0,200}", user in "[a-z0-9:]{0,10}") {
        let _ = resolve(&User::Name(user), |_| Ok(text.clone()));
    }
}
