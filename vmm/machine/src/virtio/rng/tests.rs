use super::*;
use crate::virtio::testing::{Driver, conformance_tests};

conformance_tests!((Box::new(Rng::new()) as Box<dyn VirtioDevice>, ()));

#[test]
fn a_buffer_is_filled_and_the_driver_interrupted_once() {
    let mut driver = Driver::started(Box::new(Rng::new()));
    let (a, b) = (driver.writable(64), driver.writable(100));
    driver.add(0, &[a]);
    driver.add(0, &[b]);
    driver.kick(0);
    let used = driver.used(0);
    assert_eq!(used.iter().map(|u| u.len).collect::<Vec<_>>(), [64, 100]);
    assert_ne!(driver.bytes(a.address, 64), vec![0xee; 64]);
    assert_ne!(driver.bytes(b.address, 100), vec![0xee; 100]);
    assert_eq!(driver.interrupt(), Some(1));
    assert_eq!(driver.interrupt(), None);
}

#[test]
fn a_huge_buffer_is_filled_in_part() {
    let mut driver = Driver::started(Box::new(Rng::new()));
    let buffer = driver.writable(1 << 20);
    driver.add(0, &[buffer]);
    driver.kick(0);
    assert_eq!(driver.used(0)[0].len, MAX_REQUEST_BYTES as u32);
}

#[test]
fn a_flood_is_served_to_the_end() {
    let mut driver = Driver::started(Box::new(Rng::new()));
    for _ in 0..100 {
        for _ in 0..8 {
            let buffer = driver.writable(16);
            driver.add(0, &[buffer]);
        }
        driver.kick(0);
        driver.settle();
        assert_eq!(driver.used(0).len(), 8);
    }
}
