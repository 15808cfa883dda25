//! Whose a new file is, and which privileges a write takes away: both are the host kernel's to decide, by the ids and
//! capabilities of the thread that asks.
#![allow(unsafe_code, reason = "setfsuid and setfsgid have no safe wrapper")]
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

/// The server's own capabilities, read at the start.
#[derive(Debug, Clone, Copy)]
pub(super) struct Identity {
    own: Option<CapabilitySets>,
}

impl Identity {
    pub(super) fn current() -> Self {
        Self { own: capabilities(None).ok() }
    }

    /// Does something as the owner that a new file shall have. The guest's kernel has checked the permissions already.
    pub(super) fn act_as<T>(&self, uid: u32, gid: u32, act: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        if gid != 0 {
            set_fs_gid(gid);
        }
        if uid != 0 {
            set_fs_uid(uid);
            // The change of user took away what overrides permissions.
            if let Some(own) = self.own {
                let _ = set_capabilities(None, own);
            }
        }
        let result = act();
        if uid != 0 {
            set_fs_uid(0);
        }
        if gid != 0 {
            set_fs_gid(0);
        }
        result
    }

    /// Does something without the right to keep a changed file's set-id bits.
    pub(super) fn killing_set_id<T>(&self, kill: bool, act: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        let Some(own) = self.own.filter(|_| kill) else { return act() };
        let mut fewer = own;
        fewer.effective.remove(CapabilitySet::FSETID);
        set_capabilities(None, fewer)?;
        let result = act();
        set_capabilities(None, own)?;
        result
    }
}

fn set_fs_uid(uid: u32) {
    // SAFETY: it takes a number and changes the calling thread's file system user id only.
    unsafe {
        libc::setfsuid(uid);
    }
}

fn set_fs_gid(gid: u32) {
    // SAFETY: it takes a number and changes the calling thread's file system group id only.
    unsafe {
        libc::setfsgid(gid);
    }
}
