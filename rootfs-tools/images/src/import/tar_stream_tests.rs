#![allow(clippy::unwrap_used)]
use proptest::prelude::*;
use tar::{Builder, EntryType, Header};

use super::*;

fn archive(members: &[(&str, EntryType, &str, &[u8])]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (name, kind, link, content) in members {
        let mut header = Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_size(content.len() as u64);
        header.as_gnu_mut().unwrap().name[..name.len().min(100)]
            .copy_from_slice(&name.as_bytes()[..name.len().min(100)]);
        header.as_gnu_mut().unwrap().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        builder.append(&header, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

fn list(bytes: &[u8]) -> Result<Vec<(Member, Vec<u8>)>, TarError> {
    let mut stream = TarStream::new(bytes);
    let mut members = Vec::new();
    while let Some(member) = stream.next_member()? {
        let mut content = Vec::new();
        stream.read_to_end(&mut content).map_err(|error| stream.truncated(&error))?;
        members.push((member, content));
    }
    Ok(members)
}

#[test]
fn members_are_read() {
    let long = "n".repeat(150);
    let pax = format!("{} path=pax/{}\n13 comment=x\n", 14 + 150, long);
    let bytes = archive(&[
        ("./a", EntryType::Regular, "", b"content"),
        ("d/", EntryType::Directory, "", b""),
        ("d/link", EntryType::Symlink, "../a", b""),
        ("hard", EntryType::Link, "d/link", b""),
        ("././@LongLink", EntryType::GNULongName, "", format!("{long}\0").as_bytes()),
        ("short", EntryType::Regular, "", b"x"),
        ("pax", EntryType::XHeader, "", pax.as_bytes()),
        ("short", EntryType::Regular, "", &[7; 512]),
    ]);
    let members = list(&bytes).unwrap();
    let names: Vec<&str> = members.iter().map(|(member, _)| member.name.as_str()).collect();
    assert_eq!(names, ["a", "d", "d/link", "hard", &long, &format!("pax/{long}")]);
    assert_eq!(members[0].1, b"content");
    assert_eq!(members[2].0.kind, Kind::Link("a".to_owned()));
    assert_eq!(members[3].0.kind, Kind::Link("d/link".to_owned()));
    assert_eq!(members[5].1, [7; 512]);
}

#[test]
fn every_cut_is_noticed_but_those_that_lose_nothing() {
    let bytes = archive(&[("a", EntryType::Regular, "", &[1; 700]), ("b", EntryType::Regular, "", b"2")]);
    for end in 0..bytes.len() {
        let whole = list(&bytes[..end]).is_ok();
        // Nothing, in or after the padding of a member, and after one end block.
        let lossless = end == 0 || (512 + 700..=1536).contains(&end) || (2048 + 1..=2560).contains(&end) || end >= 3072;
        assert_eq!(whole, lossless, "cut at {end}");
    }
}

#[test]
fn what_leads_out_is_refused() {
    for members in [
        [("/etc/passwd", EntryType::Regular, "")],
        [("../x", EntryType::Regular, "")],
        [("a/../../x", EntryType::Regular, "")],
        [("a/../b", EntryType::Regular, "")],
        [("a/link", EntryType::Symlink, "../../x")],
        [("a/link", EntryType::Symlink, "/etc/passwd")],
        [("link", EntryType::Link, "../x")],
    ] {
        let members: Vec<_> = members.iter().map(|(name, kind, link)| (*name, *kind, *link, b"".as_slice())).collect();
        let error = list(&archive(&members)).unwrap_err();
        assert!(error.reason.contains("leads out"), "{members:?}: {error}");
    }
}

#[test]
fn absurd_headers_are_refused() {
    let mut header = Header::new_gnu();
    header.as_gnu_mut().unwrap().name[0] = b'a';
    header.set_entry_type(EntryType::Regular);
    header.as_gnu_mut().unwrap().size = [0xff; 12];
    header.as_gnu_mut().unwrap().size[0] = 0x80;
    header.set_cksum();
    assert!(list(header.as_bytes()).is_err());
    let long = vec![b'n'; 5000];
    assert!(list(&archive(&[("x", EntryType::GNULongName, "", &long)])).unwrap_err().reason.contains("4096"));
    for pax in ["x", "5 a=b", "99 path=a\n", "3 =", "0 a=b\n", "13 size=-12\n", "22 path=a/../../../b\n\n"] {
        assert!(
            list(&archive(&[("x", EntryType::XHeader, "", pax.as_bytes()), ("y", EntryType::Regular, "", b"")]))
                .is_err(),
            "{pax:?}"
        );
    }
    assert!(list(&[b'x'; 512]).unwrap_err().reason.contains("is this an archive"));
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..2000), at in 0usize..3072, byte in any::<u8>()) {
        let _ = list(&bytes);
        let mut bytes = archive(&[("a", EntryType::Regular, "", &[1; 700]), ("b", EntryType::XHeader, "", b"9 path=z\n"), ("b", EntryType::Regular, "", b"2")]);
        bytes[at] = byte;
        // With its checksum mended, so that the damage gets further.
        let block = at / 512 * 512;
        let mut header = Header::from_byte_slice(&bytes[block..block + 512]).clone();
        let _ = list(&bytes);
        header.set_cksum();
        bytes[block..block + 512].copy_from_slice(header.as_bytes());
        let _ = list(&bytes);
    }
}
