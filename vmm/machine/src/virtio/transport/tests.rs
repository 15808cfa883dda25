//! What no device can be told apart by is tested in `testing::conformance`.
use super::*;
use crate::virtio::rng::Rng;
use crate::virtio::testing::Driver;

#[test]
fn registers_are_32_bits_wide() {
    let mut driver = Driver::new(Box::new(Rng::new()));
    for len in [1, 2, 8] {
        let mut data = vec![0xff; len];
        driver.transport.read(REG_MAGIC, &mut data);
        assert_eq!(data, vec![0; len]);
        driver.transport.write(REG_STATUS, &vec![1; len]);
        assert_eq!(driver.status(), 0);
    }
}

#[test]
fn an_unacknowledged_interrupt_is_raised_again_after_a_restore() {
    let mut driver = Driver::started(Box::new(Rng::new()));
    let buffer = driver.writable(16);
    driver.add(0, &[buffer]);
    driver.kick(0);
    let state = driver.transport.save();
    let mut restored = driver.restored(Box::new(Rng::new()), &state).unwrap();
    assert_eq!(restored.interrupt(), Some(1));
    assert_eq!(restored.used(0).len(), 1);
    assert_eq!(restored.interrupt(), None);
}

#[test]
fn a_notification_in_a_pause_is_not_lost() {
    let mut driver = Driver::started(Box::new(Rng::new()));
    driver.settle();
    driver.transport.pause();
    let buffer = driver.writable(16);
    driver.add(0, &[buffer]);
    driver.kick(0);
    assert!(driver.used(0).is_empty());
    driver.transport.resume().unwrap();
    driver.settle();
    assert_eq!(driver.used(0).len(), 1);
}

#[test]
fn the_driver_chooses_a_smaller_queue() {
    let mut driver = Driver::new(Box::new(Rng::new()));
    driver.negotiate(u64::MAX);
    driver.write(REG_QUEUE_SEL, 0);
    for (asked, got) in [(4, 4), (3, 4), (0, 4), (16, 4), (0x1_0002, 4), (2, 2)] {
        driver.write(REG_QUEUE_NUM, asked);
        let state = serde_json::to_value(driver.transport.save()).unwrap();
        driver.transport.resume().unwrap();
        assert_eq!(state["queues"][0]["size"], got, "asked for {asked}");
    }
}
