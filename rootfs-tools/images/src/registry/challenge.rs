//! `WWW-Authenticate` (RFC 9110, 11.6.1; RFC 6750), as far as registries use it.

/// What a registry wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

/// The first challenge that we can meet; bearer before basic.
pub(super) fn parse(header: &str) -> Option<Challenge> {
    let mut basic = false;
    let mut rest = header.trim();
    while !rest.is_empty() {
        let (scheme, after) = rest.split_once([' ', ',']).unwrap_or((rest, ""));
        let (parameters, after) = parameters(after.trim_start());
        if scheme.eq_ignore_ascii_case("bearer") {
            let get = |name: &str| {
                let found = parameters.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                found.map(|(_, value)| value.clone())
            };
            if let Some(realm) = get("realm") {
                return Some(Challenge::Bearer { realm, service: get("service"), scope: get("scope") });
            }
        }
        basic |= scheme.eq_ignore_ascii_case("basic");
        rest = after;
    }
    basic.then_some(Challenge::Basic)
}

/// `key=value` or `key="value"`, separated by commas, up to the next scheme.
fn parameters(mut text: &str) -> (Vec<(String, String)>, &str) {
    let mut found = Vec::new();
    loop {
        text = text.trim_start_matches([' ', ',', '\t']);
        let key_end =
            text.find(|char: char| !(char.is_ascii_alphanumeric() || "_-".contains(char))).unwrap_or(text.len());
        let (key, after) = text.split_at(key_end);
        let Some(after) = after.strip_prefix('=') else {
            // Not a parameter: the next scheme, or nonsense, of which one character is passed over so that this ends.
            let stuck = key.is_empty() && !text.is_empty();
            let skip = if stuck { text.chars().next().map_or(0, char::len_utf8) } else { 0 };
            return (found, &text[skip..]);
        };
        let mut value = String::new();
        if let Some(quoted) = after.strip_prefix('"') {
            let mut chars = quoted.char_indices();
            let mut end = quoted.len();
            while let Some((at, char)) = chars.next() {
                match char {
                    '"' => {
                        end = at + 1;
                        break;
                    }
                    '\\' => value.extend(chars.next().map(|(_, char)| char)),
                    char => value.push(char),
                }
            }
            text = &quoted[end..];
        } else {
            let end = after.find([',', ' ']).unwrap_or(after.len());
            value.push_str(&after[..end]);
            text = &after[end..];
        }
        found.push((key.to_owned(), value));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn challenges_are_read() {
        let bearer = |realm: &str, service: Option<&str>, scope: Option<&str>| Challenge::Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        };
        for (header, challenge) in [
            (
                r#"Bearer realm="https://auth.example/token",service="registry.example",scope="repository:a/b:pull,push""#,
                Some(bearer("https://auth.example/token", Some("registry.example"), Some("repository:a/b:pull,push"))),
            ),
            (r#"Basic realm="x", Bearer realm="https://a/t""#, Some(bearer("https://a/t", None, None))),
            (r#"bearer   realm=https://a/t , service=s"#, Some(bearer("https://a/t", Some("s"), None))),
            (r#"Bearer realm="a\"b"#, Some(bearer("a\"b", None, None))),
            (r#"BASIC realm="x, y", charset="UTF-8""#, Some(Challenge::Basic)),
            ("Negotiate, Basic", Some(Challenge::Basic)),
            ("Negotiate", None),
            ("", None),
        ] {
            assert_eq!(parse(header), challenge, "{header}");
        }
    }

    proptest! {
        #[test]
        fn any_header_is_read(header in "(Bearer |Basic|realm=|\"|,|=| |\\\\|x|é){0,30}", other in ".{0,100}") {
            let _ = parse(&header);
            let _ = parse(&other);
        }
    }
}
