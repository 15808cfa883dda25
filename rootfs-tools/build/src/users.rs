//! Names of users and groups, resolved in an image's own /etc/passwd and /etc/group: for `--chown`, and for the
//! directory that WORKDIR makes.
use crate::tree::{Kind, View};
use std::io::{self, Read};
use std::path::Path;

/// How much of such a file is read, bytes.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// Why an owner cannot be found out.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// The name is not there.
    #[error("{what} {name:?} is not in the image's {file}: use a number, or make it with a RUN before")]
    Unknown {
        /// user or group.
        what: &'static str,
        /// The name.
        name: String,
        /// The file.
        file: &'static str,
    },
    /// The file cannot be read.
    #[error("cannot read the image's {file}")]
    Read {
        /// The file.
        file: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Resolves `user[:group]`, each a name or a number. A user without a group has the group that /etc/passwd gives, or the
/// one of the same number.
pub fn owner(view: &View, text: &str) -> Result<(u32, u32), UserError> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (text, None),
    };
    let (uid, own_gid) = match user.parse::<u32>() {
        Ok(uid) => (uid, uid),
        Err(_) if user.is_empty() => (0, 0),
        Err(_) => {
            let fields = find(view, "etc/passwd", user)?;
            let number = |index: usize| fields.get(index).and_then(|field| field.parse::<u32>().ok());
            match (number(2), number(3)) {
                (Some(uid), Some(gid)) => (uid, gid),
                _ => {
                    return Err(UserError::Unknown { what: "user", name: user.to_owned(), file: "etc/passwd" });
                }
            }
        }
    };
    let gid = match group {
        None => own_gid,
        Some(group) => match group.parse::<u32>() {
            Ok(gid) => gid,
            Err(_) => {
                let fields = find(view, "etc/group", group)?;
                fields.get(2).and_then(|field| field.parse().ok()).ok_or(UserError::Unknown {
                    what: "group",
                    name: group.to_owned(),
                    file: "etc/group",
                })?
            }
        },
    };
    Ok((uid, gid))
}

/// The colon-separated fields of the line of `name`; none if there is no such line.
fn find(view: &View, file: &'static str, name: &str) -> Result<Vec<String>, UserError> {
    let fail = |source| UserError::Read { file, source };
    let Ok(path) = view.resolve(Path::new(file)) else { return Ok(Vec::new()) };
    let Some(Kind::File { size, content }) = view.get(&path).map(|node| &node.kind) else { return Ok(Vec::new()) };
    let mut bytes = Vec::new();
    content.open(*size).map_err(fail)?.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(fail)?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(text
        .lines()
        .map(|line| line.split(':').map(str::to_owned).collect::<Vec<_>>())
        .find(|fields| fields.first().is_some_and(|first| first == name))
        .unwrap_or_default())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::tree::{Changes, Content, Node};
    use std::sync::Arc;

    #[test]
    fn names_and_numbers() {
        let mut changes = Changes::default();
        for (path, text) in [
            ("etc/passwd", "root:x:0:0::/:/bin/sh\nweb:x:33:34::/:/bin/sh\n"),
            ("etc/group", "root:x:0:\nstaff:x:50:web\n"),
        ] {
            let content = Content::Bytes(text.as_bytes().into());
            let kind = Kind::File { size: text.len() as u64, content };
            changes.added.insert(path.into(), Arc::new(Node { kind, ..Node::directory(0o644) }));
        }
        let mut view = View::default();
        view.apply(&changes);
        assert_eq!(owner(&view, "web").unwrap(), (33, 34));
        assert_eq!(owner(&view, "web:staff").unwrap(), (33, 50));
        assert_eq!(owner(&view, "7").unwrap(), (7, 7));
        assert_eq!(owner(&view, "7:8").unwrap(), (7, 8));
        assert_eq!(owner(&view, ":staff").unwrap(), (0, 50));
        assert!(owner(&view, "nobody").is_err());
        assert!(owner(&view, "web:nothing").unwrap_err().to_string().contains("etc/group"));
        assert!(owner(&View::default(), "web").is_err());
    }
}
