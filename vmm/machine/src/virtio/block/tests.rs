use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::Block;
use crate::virtio::VirtioDevice;
use crate::virtio::testing::{Desc, Driver, conformance_tests};

const SECTORS: u64 = 256;

fn medium() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SECTORS * 512).unwrap();
    file
}

fn disk(read_only: bool) -> (Driver, File) {
    let file = medium();
    let block = Block::new(Some(file.try_clone().unwrap()), read_only).unwrap();
    (Driver::started(Box::new(block)), file)
}

conformance_tests!((Box::new(Block::new(Some(medium()), false).unwrap()) as Box<dyn VirtioDevice>, ()));

mod stub {
    use super::*;
    conformance_tests!((Box::new(Block::new(None, true).unwrap()) as Box<dyn VirtioDevice>, ()));
}

/// Adds a request; gives where its status will be.
fn add(driver: &mut Driver, kind: u32, sector: u64, data: &[Desc]) -> u64 {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    let mut descs = vec![driver.readable(&header)];
    descs.extend_from_slice(data);
    let status = driver.writable(1);
    descs.push(status);
    driver.add(0, &descs);
    status.address
}

/// Serves one request; gives its status.
fn request(driver: &mut Driver, kind: u32, sector: u64, data: &[Desc]) -> u8 {
    let status = add(driver, kind, sector, data);
    driver.kick(0);
    driver.settle();
    assert_eq!(driver.used(0).len(), 1);
    driver.bytes(status, 1)[0]
}

#[test]
fn what_was_written_is_read() {
    let (mut driver, file) = disk(false);
    let pattern: Vec<u8> = (0..2048_u32).map(|i| (i / 3) as u8).collect();
    let (a, b) = (driver.readable(&pattern[..700]), driver.readable(&pattern[700..]));
    assert_eq!(request(&mut driver, 1, 5, &[a, b]), 0);
    assert_eq!(request(&mut driver, 4, 0, &[]), 0);
    let mut on_disk = vec![0; 2048];
    file.read_exact_at(&mut on_disk, 5 * 512).unwrap();
    assert_eq!(on_disk, pattern);
    let (c, d) = (driver.writable(1000), driver.writable(1048));
    assert_eq!(request(&mut driver, 0, 5, &[c, d]), 0);
    let mut read = driver.bytes(c.address, 1000);
    read.extend(driver.bytes(d.address, 1048));
    assert_eq!(read, pattern);
}

#[test]
fn many_requests_make_one_interrupt() {
    let (mut driver, _file) = disk(false);
    while driver.interrupt().is_some() {}
    for sector in 0..30 {
        let data = driver.readable(&[sector as u8; 512]);
        add(&mut driver, 1, sector, &[data]);
    }
    driver.kick(0);
    driver.settle();
    assert_eq!(driver.used(0).len(), 30);
    assert_eq!(driver.interrupt(), Some(1));
    assert_eq!(driver.interrupt(), None);
}

#[test]
fn requests_out_of_bounds_fail() {
    let (mut driver, _file) = disk(false);
    let data = driver.writable(1024);
    for sector in [SECTORS - 1, SECTORS, u64::MAX, u64::MAX / 512] {
        assert_eq!(request(&mut driver, 0, sector, &[data]), 1, "{sector}");
    }
    let odd = driver.writable(511);
    assert_eq!(request(&mut driver, 0, 0, &[odd]), 1);
    assert_eq!(request(&mut driver, 0, SECTORS - 2, &[data]), 0);
    assert_eq!(request(&mut driver, 99, 0, &[data]), 2);
    assert!(!driver.needs_reset());
}

#[test]
fn a_request_without_a_header_or_a_status_breaks_the_driver() {
    for descs in [(10, 10), (16, 0), (0, 16)] {
        let (mut driver, _file) = disk(false);
        let header = driver.readable(&vec![0; descs.0]);
        let status = driver.writable(descs.1);
        driver.add(0, &[header, status]);
        driver.kick(0);
        assert!(driver.needs_reset(), "{descs:?}");
    }
}

#[test]
fn a_read_only_disk_refuses_to_write() {
    let (mut driver, file) = disk(true);
    assert_ne!(driver.features() & 1 << 5, 0);
    let data = driver.readable(&[7; 512]);
    assert_eq!(request(&mut driver, 1, 0, &[data]), 1);
    let range = driver.readable(&range(0, 1, 0));
    assert_eq!(request(&mut driver, 11, 0, &[range]), 1);
    assert_eq!(request(&mut driver, 13, 0, &[range]), 1);
    let mut byte = [0];
    file.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [0]);
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

#[test]
fn discard_and_write_zeroes_make_holes() {
    for kind in [11, 13] {
        let (mut driver, file) = disk(false);
        file.write_all_at(&vec![7; SECTORS as usize * 512], 0).unwrap();
        let before = file.metadata().unwrap().blocks();
        let flags = u32::from(kind == 13);
        let ranges = [range(0, 128, flags), range(192, 64, flags)].concat();
        let ranges = driver.readable(&ranges);
        assert_eq!(request(&mut driver, kind, 0, &[ranges]), 0);
        let mut bytes = vec![0; SECTORS as usize * 512];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let byte_of = |sector: usize| bytes[sector * 512];
        assert_eq!([0, 127, 128, 191, 192, 255].map(byte_of), [0, 0, 7, 7, 0, 0]);
        assert!(file.metadata().unwrap().blocks() < before);
        assert_eq!(file.metadata().unwrap().len(), SECTORS * 512);
        for bad in [range(SECTORS - 1, 2, 0), range(u64::MAX, 1, 0), range(0, u32::MAX, 0), vec![0; 15]] {
            let bad = driver.readable(&bad);
            assert_eq!(request(&mut driver, kind, 0, &[bad]), 1);
        }
        let unknown = driver.readable(&range(0, 1, 8));
        assert_eq!(request(&mut driver, kind, 0, &[unknown]), 2);
    }
}

#[test]
fn it_has_a_name() {
    let (mut driver, _file) = disk(false);
    let id = driver.writable(20);
    assert_eq!(request(&mut driver, 8, 0, &[id]), 0);
    assert_eq!(&driver.bytes(id.address, 8), b"caisson\0");
    let short = driver.writable(19);
    assert_eq!(request(&mut driver, 8, 0, &[short]), 1);
}

#[test]
fn the_last_sector_of_a_read_only_medium_is_filled_up() {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[9; 700], 0).unwrap();
    let block = Block::new(Some(file), true).unwrap();
    let mut driver = Driver::started(Box::new(block));
    assert_eq!(driver.config(0, 8), 2_u64.to_le_bytes());
    let data = driver.writable(1024);
    assert_eq!(request(&mut driver, 0, 0, &[data]), 0);
    let bytes = driver.bytes(data.address, 1024);
    assert_eq!((&bytes[..700], &bytes[700..]), (&[9; 700][..], &[0; 324][..]));
}

#[test]
fn a_stub_gets_its_medium_at_the_restore() {
    for read_only in [false, true] {
        let stub = Block::new(None, read_only).unwrap();
        let mut template = Driver::started(Box::new(stub));
        assert_eq!(template.config(0, 8), [0; 8]);
        let data = template.writable(512);
        assert_eq!(request(&mut template, 0, 0, &[data]), 1);
        while template.interrupt().is_some() {}
        let generation = template.read(0xfc);
        let state = template.transport.save();

        let file = medium();
        file.write_all_at(&[5; 512], 0).unwrap();
        let block = Block::new(Some(file), read_only).unwrap();
        let mut clone = template.restored(Box::new(block), &state).unwrap();
        assert_eq!(clone.interrupt(), Some(2));
        assert_ne!(clone.read(0xfc), generation);
        assert_eq!(clone.config(0, 8), SECTORS.to_le_bytes());
        assert_eq!(request(&mut clone, 0, 0, &[data]), 0);
        assert_eq!(clone.bytes(data.address, 512), [5; 512]);

        let other_kind = Block::new(Some(medium()), !read_only).unwrap();
        assert!(template.restored(Box::new(other_kind), &state).is_err());
    }
}
