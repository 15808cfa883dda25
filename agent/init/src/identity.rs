//! Who a process runs as: names are looked up in the root's own /etc/passwd and /etc/group.
use crate::error::{Result, error};
use alloc::{
    format,
    string::{String, ToString},
    vec::Vec,
};
use caisson_agent_protocol::{ErrorKind, User};
use rustix::{
    fs::{Mode, OFlags, ResolveFlags},
    io::Errno,
};

/// The longest database that is read, in bytes. An image's has some KiB; it is the tenant's, and so it is bounded.
const MAX_DATABASE_BYTES: usize = 1 << 20;
/// The most supplementary groups, which is the kernel's limit too.
const MAX_GROUPS: usize = 65536;

/// A user, by numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) umask: Option<u32>,
    pub(crate) home: String,
}

/// A line of /etc/passwd.
struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let (uid, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        let home = fields.nth(1).unwrap_or("");
        Some(Account { name, uid, gid, home })
    })
}

/// A line of /etc/group: name, number, members.
fn groups(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        Some((name, fields.next()?.parse().ok()?, fields.next().unwrap_or("")))
    })
}

/// Finds out who `user` is. `read` gives a database's text, empty if there is none.
pub(crate) fn resolve(user: &User, read: impl Fn(&str) -> Result<String>) -> Result<Identity> {
    let passwd = read("/etc/passwd")?;
    let home_of = |home: &str| if home.is_empty() { "/".to_string() } else { home.to_string() };
    let (user_part, group_part) = match user {
        User::Ids { uid, gid, additional_gids, umask } => {
            let home = accounts(&passwd).find(|account| account.uid == *uid).map_or("", |account| account.home);
            return Ok(Identity {
                uid: *uid,
                gid: *gid,
                groups: additional_gids.clone(),
                umask: *umask,
                home: home_of(home),
            });
        }
        User::Name(name) => match name.split_once(':') {
            Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
            None => (name.as_str(), None),
        },
    };
    let user_part = if user_part.is_empty() { "0" } else { user_part };
    // A name goes before a number, as in docker: an account may be called "1000".
    let number = user_part.parse::<u32>().ok();
    let account = accounts(&passwd)
        .find(|account| account.name == user_part)
        .or_else(|| accounts(&passwd).find(|account| Some(account.uid) == number));
    let (uid, mut gid, home) = match (&account, number) {
        (Some(account), _) => (account.uid, account.gid, home_of(account.home)),
        (None, Some(uid)) => (uid, 0, "/".to_string()),
        (None, None) => {
            return Err(error(
                ErrorKind::Invalid,
                format!("unable to find user {user_part}: no matching entries in passwd file"),
            ));
        }
    };
    let mut supplementary = Vec::new();
    if let Some(part) = group_part {
        let group = read("/etc/group")?;
        gid = groups(&group)
            .find(|(name, ..)| *name == part)
            .map(|(_, gid, _)| gid)
            .or_else(|| part.parse().ok())
            .ok_or_else(|| {
                error(ErrorKind::Invalid, format!("unable to find group {part}: no matching entries in group file"))
            })?;
    } else if let Some(account) = &account {
        let group = read("/etc/group")?;
        let member = groups(&group).filter(|(_, _, members)| members.split(',').any(|member| member == account.name));
        supplementary = member.map(|(_, gid, _)| gid).take(MAX_GROUPS).collect();
    }
    Ok(Identity { uid, gid, groups: supplementary, umask: None, home })
}

/// Reads a database of the container, which the calling process is in.
pub(crate) fn read_database(path: &str) -> Result<String> {
    // The image may have put anything there: a fifo must not block, a link not lead out.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = match rustix::fs::openat2(rustix::fs::CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS) {
        Ok(file) => file,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(String::new()),
        Err(errno) => return Err(failure(path, errno)),
    };
    let mut content = Vec::new();
    let mut buffer = [0; 2048];
    loop {
        match rustix::io::read(&file, &mut buffer) {
            Ok(0) => return Ok(String::from_utf8_lossy(&content).into_owned()),
            Ok(count) => content.extend_from_slice(&buffer[..count]),
            Err(errno) => return Err(failure(path, errno)),
        }
        if content.len() > MAX_DATABASE_BYTES {
            return Err(error(ErrorKind::Invalid, format!("{path} is longer than {MAX_DATABASE_BYTES} bytes")));
        }
    }
}

fn failure(path: &str, errno: Errno) -> caisson_agent_protocol::AgentError {
    error(ErrorKind::System, format!("reading {path}: {}", crate::error::describe(errno)))
}

#[cfg(test)]
mod tests;
