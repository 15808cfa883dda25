//! What every device must bear. [`conformance_tests`] makes the tests of one kind of device.

use proptest::prelude::*;

use super::driver::{Desc, Driver, HOLE, SECOND_REGION};
use crate::virtio::VirtioDevice;
use crate::virtio::transport::{feature, status};

/// Makes the tests of a device; the argument is an expression that gives a fresh
/// `Box<dyn VirtioDevice>` and what must be kept alive with it.
macro_rules! conformance_tests {
    ($new:expr) => {
        mod conformance {
            use super::*;
            use $crate::virtio::testing as t;

            #[test]
            fn negotiates_and_starts() {
                let (device, _keep) = $new;
                t::negotiates_and_starts(device);
            }

            #[test]
            fn status_goes_its_way_only() {
                let (device, _keep) = $new;
                t::status_goes_its_way_only(device);
            }

            #[test]
            fn queues_are_frozen_once_ready() {
                let (device, _keep) = $new;
                t::queues_are_frozen_once_ready(device);
            }

            #[test]
            fn malformed_chains_break_the_driver_only() {
                let (device, _keep) = $new;
                t::malformed_chains_break_the_driver_only(device);
            }

            #[test]
            fn rings_outside_memory_are_refused() {
                let (device, _keep) = $new;
                t::rings_outside_memory_are_refused(device);
            }

            #[test]
            fn stops_and_starts_again() {
                let (device, _keep) = $new;
                t::stops_and_starts_again(device);
            }

            #[test]
            fn goes_on_in_another_process() {
                let (device, _keep) = $new;
                let (other, _keep_other) = $new;
                t::goes_on_in_another_process(device, other);
            }

            #[test]
            fn corrupt_states_are_refused() {
                let (device, _keep) = $new;
                t::corrupt_states_are_refused(device, || $new);
            }

            #[test]
            fn bears_random_accesses() {
                t::bears_random_accesses(|| $new);
            }

            #[test]
            fn bears_random_chains() {
                t::bears_random_chains(|| $new);
            }
        }
    };
}
pub(crate) use conformance_tests;

const F_NEXT: u16 = 1;
const F_INDIRECT: u16 = 4;

pub(crate) fn negotiates_and_starts(device: Box<dyn VirtioDevice>) {
    let mut driver = Driver::new(device);
    assert_eq!(driver.read(0x00), 0x7472_6976);
    assert_eq!(driver.read(0x04), 2);
    assert_ne!(driver.read(0x08), 0);
    for mask in [0, u64::MAX, !feature::EVENT_IDX] {
        driver.start(mask);
        driver.settle();
        assert!(!driver.needs_reset());
    }
    // No shared memory, and no more queues than there are.
    assert_eq!((driver.read(0xb0), driver.read(0xb4)), (u32::MAX, u32::MAX));
    let count = driver.queue_count() as u32;
    for index in [count, u32::MAX] {
        driver.write(0x30, index);
        assert_eq!((driver.read(0x34), driver.read(0x44)), (0, 0));
        driver.write(0x50, index);
    }
    assert!(!driver.needs_reset());
}

pub(crate) fn status_goes_its_way_only(device: Box<dyn VirtioDevice>) {
    let mut driver = Driver::new(device);
    // No features before DRIVER, no DRIVER_OK before FEATURES_OK.
    driver.write(0x70, status::FEATURES_OK);
    assert_eq!(driver.status(), 0);
    driver.write(0x70, status::DRIVER_OK);
    assert_eq!(driver.status(), 0);
    let started = status::ACKNOWLEDGE | status::DRIVER;
    driver.write(0x70, started);
    driver.write(0x70, started | status::DRIVER_OK);
    assert_eq!(driver.status(), started);
    // A driver of before 1.0, and one that takes what is not offered.
    driver.write(0x24, 0);
    driver.write(0x20, 0);
    driver.write(0x70, started | status::FEATURES_OK);
    assert_eq!(driver.status(), started);
    driver.write(0x24, 1);
    driver.write(0x20, u32::MAX);
    driver.write(0x70, started | status::FEATURES_OK);
    assert_eq!(driver.status(), started);
    // A bit once set stays until a reset.
    driver.start(u64::MAX);
    let all = driver.status();
    driver.write(0x70, status::ACKNOWLEDGE);
    assert_eq!(driver.status(), all);
    driver.write(0x70, all | status::FAILED);
    assert_ne!(driver.status() & status::FAILED, 0);
    driver.write(0x70, 0);
    assert_eq!(driver.status(), 0);
    driver.start(u64::MAX);
}

pub(crate) fn queues_are_frozen_once_ready(device: Box<dyn VirtioDevice>) {
    let mut driver = Driver::started(device);
    let before = serde_json::to_value(driver.transport.save()).unwrap();
    driver.transport.resume().unwrap();
    for queue in 0..driver.queue_count() as u32 {
        driver.write(0x30, queue);
        for register in [0x38, 0x44, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4] {
            driver.write(register, 0x10);
            driver.write(register, 0);
        }
    }
    driver.write(0x30, 0);
    driver.write(0x24, 0);
    driver.write(0x20, 0);
    let after = serde_json::to_value(driver.transport.save()).unwrap();
    let mut before = before;
    for field in ["queue_sel", "driver_features_sel", "device_features_sel"] {
        before[field] = after[field].clone();
    }
    assert_eq!(before, after);
}

type Malform = fn(&mut Driver, usize);

/// Ways to make a chain wrong, each for descriptor 0 of queue `q`.
fn malformations() -> Vec<(&'static str, Malform)> {
    fn one(driver: &mut Driver, q: usize, address: u64, len: u32, writable: bool) {
        let desc = Desc { address, len, writable };
        driver.raw_desc(q, 0, desc, 0, 0);
        driver.publish(q, 0);
    }
    fn indirect(driver: &mut Driver, q: usize, address: u64, len: u32) {
        let desc = Desc { address, len, writable: false };
        driver.raw_desc(q, 0, desc, F_INDIRECT, 0);
        driver.publish(q, 0);
    }
    vec![
        ("a loop", |d, q| {
            let buffer = d.readable(&[0; 64]);
            d.raw_desc(q, 0, buffer, F_NEXT, 0);
            d.publish(q, 0);
        }),
        ("a next that is out of bounds", |d, q| {
            let buffer = d.readable(&[0; 64]);
            d.raw_desc(q, 0, buffer, F_NEXT, u16::MAX);
            d.publish(q, 0);
        }),
        ("a head that is out of bounds", |d, q| {
            d.publish(q, u16::MAX);
        }),
        ("an address in a hole", |d, q| one(d, q, HOLE, 64, false)),
        ("a buffer that runs into a hole", |d, q| {
            one(d, q, HOLE - 32, 64, true);
        }),
        ("an address that wraps", |d, q| one(d, q, u64::MAX - 31, 64, true)),
        ("a huge length", |d, q| one(d, q, SECOND_REGION, u32::MAX, true)),
        ("an indirect table in a hole", |d, q| indirect(d, q, HOLE, 64)),
        ("an indirect table of no length", |d, q| {
            let table = d.allocate(64);
            indirect(d, q, table, 0);
        }),
        ("an indirect table of an odd length", |d, q| {
            let table = d.allocate(64);
            indirect(d, q, table, 17);
        }),
        ("an indirect table in an indirect table", |d, q| {
            let table = d.allocate(64);
            let inner = Desc { address: table, len: 64, writable: false };
            d.table_entry(table, inner, F_INDIRECT, 0);
            indirect(d, q, table, 64);
        }),
        ("an endless indirect table", |d, q| {
            let table = d.allocate(65536 * 16 / 8);
            let buffer = d.readable(&[0; 8]);
            for i in 0..8192_u64 {
                d.table_entry(table + i * 16, buffer, F_NEXT, (i as u16 + 1) % 8192);
            }
            indirect(d, q, table, 8192 * 16);
        }),
        ("readable after writable", |d, q| {
            let (out, back) = (d.readable(&[0; 64]), d.writable(64));
            d.raw_desc(q, 0, back, F_NEXT, 1);
            d.raw_desc(q, 1, out, 0, 0);
            d.publish(q, 0);
        }),
        ("an available index that is out of bounds", |d, q| {
            d.overrun(q);
        }),
    ]
}

pub(crate) fn malformed_chains_break_the_driver_only(device: Box<dyn VirtioDevice>) {
    let mut driver = Driver::started(device);
    for queue in 0..driver.queue_count() {
        for (name, make) in malformations() {
            driver.start(u64::MAX);
            driver.settle();
            make(&mut driver, queue);
            driver.kick(queue);
            driver.settle();
            // A device may leave a queue alone until it needs a buffer of it. If it did look, the
            // driver hears of it, and the device is silent then.
            if driver.needs_reset() {
                let interrupt = driver.interrupt();
                assert!(interrupt.is_some_and(|bits| bits & 2 != 0), "{name}");
                driver.kick(queue);
                driver.settle();
                assert!(driver.used(queue).is_empty(), "{name}");
            }
        }
    }
    // And goes on after a reset.
    driver.start(u64::MAX);
    driver.settle();
    assert!(!driver.needs_reset());
}

pub(crate) fn rings_outside_memory_are_refused(device: Box<dyn VirtioDevice>) {
    let mut driver = Driver::new(device);
    for register in [0x80, 0x90, 0xa0] {
        for address in [HOLE, u64::MAX - 0xfff, HOLE - 16] {
            driver.negotiate(u64::MAX);
            driver.set_up_queues();
            driver.write(0x30, 0);
            driver.write(0x44, 0);
            driver.write(register, address as u32);
            driver.write(register + 4, (address >> 32) as u32);
            driver.write(0x44, 1);
            let ready = driver.status() | status::DRIVER_OK;
            driver.write(0x70, ready);
            assert!(driver.needs_reset(), "{register:#x} at {address:#x}");
            driver.kick(0);
            driver.settle();
        }
    }
    driver.start(u64::MAX);
    assert!(!driver.needs_reset());
}

pub(crate) fn stops_and_starts_again(device: Box<dyn VirtioDevice>) {
    let mut driver = Driver::started(device);
    for _ in 0..3 {
        driver.transport.pause();
        driver.transport.pause();
        for queue in 0..driver.queue_count() {
            driver.kick(queue);
        }
        driver.settle();
        driver.transport.resume().unwrap();
        driver.transport.resume().unwrap();
        driver.settle();
        assert!(!driver.needs_reset());
    }
    // A reset while it is paused.
    driver.transport.pause();
    driver.write(0x70, 0);
    driver.transport.resume().unwrap();
    driver.settle();
    assert_eq!(driver.status(), 0);
    driver.start(u64::MAX);
    driver.settle();
    assert!(!driver.needs_reset());
}

pub(crate) fn goes_on_in_another_process(device: Box<dyn VirtioDevice>, other: Box<dyn VirtioDevice>) {
    let mut driver = Driver::started(device);
    driver.settle();
    let state = driver.transport.save();
    let json = serde_json::to_vec(&state).unwrap();
    let state = serde_json::from_slice(&json).unwrap();
    let mut restored = driver.restored(other, &state).unwrap();
    restored.settle();
    assert_eq!(restored.status(), driver.status());
    assert!(!restored.needs_reset());
    // The first one goes on as well.
    driver.transport.resume().unwrap();
    driver.settle();
    assert!(!driver.needs_reset());
    // And a machine that never had a driver.
    restored.write(0x70, 0);
    restored.start(u64::MAX);
    assert!(!restored.needs_reset());
}

pub(crate) fn corrupt_states_are_refused<K>(
    device: Box<dyn VirtioDevice>,
    new: impl Fn() -> (Box<dyn VirtioDevice>, K),
) {
    use serde_json::json;
    let mut driver = Driver::started(device);
    let good = serde_json::to_value(driver.transport.save()).unwrap();
    let mut bad = Vec::new();
    let mut with = |path: &str, value: serde_json::Value| {
        let mut state = good.clone();
        *state.pointer_mut(path).unwrap() = value;
        bad.push((format!("{path} = {}", state.pointer(path).unwrap()), state));
    };
    with("/device_type", json!(63));
    with("/status", json!(0xffff_ffff_u32));
    with("/status", json!(4));
    with("/driver_features", json!(u64::MAX));
    with("/driver_features", json!(0));
    with("/queues", json!([]));
    with("/queues/0/size", json!(0));
    with("/queues/0/size", json!(3));
    with("/queues/0/size", json!(0x8000));
    with("/queues/0/max_size", json!(0x8000));
    with("/queues/0/desc_table", json!(HOLE));
    with("/queues/0/desc_table", json!(1));
    with("/queues/0/avail_ring", json!(u64::MAX - 1));
    with("/queues/0/used_ring", json!(u64::MAX - 3));
    with("/device", json!("nonsense"));
    with("/device", json!({ "more": [1, 2, 3] }));
    let device_has_state = !good["device"].is_null();
    for (what, state) in bad {
        if what.starts_with("/device =") && !device_has_state {
            continue;
        }
        let (device, _keep) = new();
        let state = serde_json::from_value(state).unwrap();
        assert!(driver.restored(device, &state).is_err(), "{what}");
    }
}

pub(crate) fn bears_random_accesses<K>(new: impl Fn() -> (Box<dyn VirtioDevice>, K)) {
    let access = (any::<bool>(), 0_u64..0x140, 0_usize..4, any::<u64>());
    let small = prop_oneof![0_u64..0x140, Just(0x70), Just(0x44), Just(0x30), Just(0x50)];
    let access = prop_oneof![access, (Just(true), small, Just(2_usize), prop_oneof![0_u64..16, any::<u64>()])];
    let config = ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(start in any::<bool>(), accesses in prop::collection::vec(access, 0..100))| {
        let (device, _keep) = new();
        let mut driver = Driver::new(device);
        if start {
            driver.start(u64::MAX);
        }
        for (write, offset, size, value) in accesses {
            use crate::bus::BusDevice;
            let mut data = value.to_le_bytes();
            let data = &mut data[..1 << size];
            if write {
                driver.transport.write(offset, data);
            } else {
                driver.transport.read(offset, data);
            }
            driver.turn();
        }
        driver.settle();
    });
}

pub(crate) fn bears_random_chains<K>(new: impl Fn() -> (Box<dyn VirtioDevice>, K)) {
    let address = prop_oneof![
        8 => (1_u64 << 20)..HOLE,
        1 => 0..(1_u64 << 20),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![6 => 0_u32..200, 3 => 0_u32..70_000, 1 => any::<u32>()];
    let flags = prop_oneof![10 => 0_u16..4, 1 => any::<u16>()];
    let desc = (address, len, flags, 0_u16..16);
    let table = prop::collection::vec(desc, 16);
    let heads = prop::collection::vec((any::<prop::sample::Index>(), 0_u16..16), 1..12);
    let filler = prop::collection::vec(any::<u8>(), 256);
    let config = ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(table in table, heads in heads, filler in filler, event_idx in any::<bool>())| {
        let (device, _keep) = new();
        let mut driver = Driver::new(device);
        driver.start(if event_idx { u64::MAX } else { !feature::EVENT_IDX });
        for at in ((1 << 20)..HOLE).step_by(64 << 10) {
            use vm_memory::{Bytes, GuestAddress};
            driver.memory.write_slice(&filler, GuestAddress(at)).unwrap();
        }
        for queue in 0..driver.queue_count() {
            for (i, (address, len, flags, next)) in table.iter().enumerate() {
                let desc = Desc { address: *address, len: *len, writable: false };
                driver.raw_desc(queue, i as u16, desc, *flags, *next);
            }
        }
        for (queue, head) in heads {
            let queue = queue.index(driver.queue_count());
            driver.publish(queue, head);
            driver.kick(queue);
        }
        driver.settle();
        let state = driver.transport.save();
        drop(state);
        driver.start(u64::MAX);
    });
}
