//! Images made by Debian's own tools, once per machine: a busybox root and a Debian root, written by umoci in several layers.
use crate::process::finish;
use rustix::fs::{FlockOperation, flock};
use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

/// Part of the cache's key: to be raised whenever an image here changes.
const REVISION: u32 = 1;

/// An OCI layout (a directory) with the image `latest`: busybox, in three layers that hold whatever a layer can hold.
///
/// | layer | what |
/// |---|---|
/// | 1 | busybox, /etc, and `/data` |
/// | 2 | removes /data/removed, replaces /data/replaced, makes /data/opaque anew with one file |
/// | 3 | odd names, hard links, devices, owners, setuid, attributes |
pub fn busybox() -> PathBuf {
    made_once("busybox", make_busybox)
}

/// An OCI layout (a directory) with the image `latest`: Debian with bash, coreutils and python3, by mmdebstrap.
pub fn debian() -> PathBuf {
    made_once("debian", make_debian)
}

fn made_once(name: &str, make: fn(&Path)) -> PathBuf {
    let cache =
        std::env::var_os("HOME").map_or_else(std::env::temp_dir, PathBuf::from).join(".cache/caisson/test-images");
    fs::create_dir_all(&cache).unwrap();
    let finished = cache.join(format!("{name}-{REVISION}"));
    let lock = OpenOptions::new().create(true).append(true).open(cache.join(format!("{name}.lock"))).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    if !finished.exists() {
        let work = tempfile::Builder::new().prefix("making-").tempdir_in(&cache).unwrap();
        make(work.path());
        fs::rename(work.path().join("layout"), &finished).unwrap();
    }
    finished
}

fn tool(directory: &Path, line: &str) {
    finish(Command::new("sh").args(["-euc", line]).current_dir(directory)).success();
}

/// The commands of busybox that the image has, as links.
const APPLETS: &[&str] = &[
    "awk",
    "cat",
    "chmod",
    "cp",
    "date",
    "dd",
    "df",
    "echo",
    "env",
    "false",
    "find",
    "grep",
    "head",
    "hostname",
    "id",
    "ifconfig",
    "ip",
    "kill",
    "ln",
    "ls",
    "md5sum",
    "mkdir",
    "mknod",
    "mount",
    "mv",
    "nc",
    "nproc",
    "ping",
    "ps",
    "pwd",
    "readlink",
    "rm",
    "sed",
    "seq",
    "sh",
    "sha256sum",
    "sleep",
    "sort",
    "stat",
    "stty",
    "sync",
    "tail",
    "tar",
    "test",
    "top",
    "touch",
    "tr",
    "true",
    "tty",
    "umount",
    "uname",
    "vi",
    "wc",
    "wget",
    "yes",
];

fn make_busybox(work: &Path) {
    tool(
        work,
        "umoci init --layout layout && umoci new --image layout:latest && umoci unpack --image layout:latest bundle",
    );
    let root = work.join("bundle/rootfs");
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    tool(
        &root,
        r#"mkdir -p etc root tmp proc sys dev data/opaque home/alice var
        chmod 1777 tmp; chmod 700 root
        printf 'root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n' >etc/passwd
        printf 'root:x:0:\nalice:x:1000:\nwheel:x:10:alice\naudio:x:29:root,alice\n' >etc/group
        chown 1000:1000 home/alice
        echo old >data/removed; echo old >data/replaced; echo old >data/opaque/old; echo kept >data/kept"#,
    );
    tool(work, "umoci repack --image layout:latest bundle");
    tool(
        work,
        r#"rm -rf bundle; umoci unpack --image layout:latest bundle; cd bundle/rootfs/data
        rm removed; echo new >replaced; rm -r opaque; mkdir opaque; echo new >opaque/new"#,
    );
    tool(work, "umoci repack --image layout:latest bundle");
    tool(
        work,
        r#"rm -rf bundle; umoci unpack --image layout:latest bundle; cd bundle/rootfs/data
        echo linked >first; ln first second; ln -s /etc/passwd absolute; ln -s ../../../../etc/group out
        mknod null c 1 3; mkfifo pipe; echo s >setuid; chmod 4755 setuid; echo o >owned; chown 1234:70000 owned
        echo n >'with space'; echo n >"$(printf 'new\nline')"; echo n >"$(printf '\303\244\377')"; echo n >'back\slash'
        setfattr -n user.note -v marked first; dd if=/dev/zero of=sparse bs=1 count=1 seek=9999999 2>/dev/null
        chmod 0 opaque/new; touch -d '2001-02-03 04:05:06.789' dated"#,
    );
    tool(
        work,
        r#"umoci repack --image layout:latest bundle
        umoci config --image layout:latest --config.cmd /bin/sh --config.env PATH=/bin --config.env COLOUR=blue --config.workingdir /data
        umoci gc --layout layout"#,
    );
}

fn make_debian(work: &Path) {
    let packages = "bash,coreutils,python3-minimal,libpython3-stdlib";
    tool(
        work,
        &format!(
            "mmdebstrap --quiet --variant=essential --include={packages} \
             --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
             --dpkgopt='path-exclude=/usr/share/locale/*' bookworm root.tar"
        ),
    );
    tool(
        work,
        r#"umoci init --layout layout; umoci new --image layout:latest
        umoci raw add-layer --image layout:latest root.tar
        umoci unpack --image layout:latest bundle
        printf 'print(sum(range(10)))\n' >bundle/rootfs/usr/local/bin/sum.py; rm bundle/rootfs/usr/bin/perl
        umoci repack --image layout:latest bundle
        umoci config --image layout:latest --config.cmd /bin/bash --config.env PATH=/usr/local/bin:/usr/bin:/bin
        umoci gc --layout layout"#,
    );
}

/// A file that holds the layout as a tar, in this directory.
pub fn as_tar(layout: &Path, directory: &Path) -> PathBuf {
    let file = directory.join("layout.tar");
    tool(layout, &format!("tar -cf {} .", file.display()));
    assert!(File::open(&file).unwrap().metadata().unwrap().len() > 0);
    file
}
