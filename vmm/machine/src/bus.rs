//! The port and memory-mapped I/O busses: a map from address ranges to devices.
//!
//! An access that no device answers reads as all ones and is dropped when written, as on a PC.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A device that answers accesses to a range of addresses.
///
/// The offset counts from the start of the range. `data` is 1, 2, 4 or 8 bytes long and lies within the range; both
/// come from the guest, so a device bears every combination of them.
pub trait BusDevice: Send {
    /// The guest reads: fill all of `data`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes `data`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device as the bus holds it: vCPU threads and the event loop share it.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// Why a device could not be put on a bus.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// The range is empty, runs past the end of the address space, or overlaps one that is there.
    #[error("bus range {base:#x}+{len:#x} is empty or overlaps another")]
    Range {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// A map from address ranges to devices.
#[derive(Default, Clone)]
pub struct Bus {
    /// First address to length in bytes and device.
    ranges: BTreeMap<u64, (u64, SharedDevice)>,
}

impl Bus {
    /// Puts a device at `len` bytes from `base` on.
    ///
    /// # Errors
    /// The range is empty, wraps, or overlaps another.
    pub fn insert(&mut self, base: u64, len: u64, device: SharedDevice) -> Result<(), BusError> {
        let error = || BusError::Range { base, len };
        let last = base.checked_add(len.checked_sub(1).ok_or_else(error)?).ok_or_else(error)?;
        let overlaps = self.ranges.range(..=last).next_back().is_some_and(|(&b, &(l, _))| b + (l - 1) >= base);
        if overlaps {
            return Err(error());
        }
        self.ranges.insert(base, (len, device));
        Ok(())
    }

    /// The guest reads `data.len()` bytes at `address`. False if no device is there, and `data` is then all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                lock(device).read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// The guest writes `data` at `address`. False if no device is there.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                lock(device).write(offset, data);
                true
            }
            None => false,
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, &SharedDevice)> {
        let (base, (range, device)) = self.ranges.range(..=address).next_back()?;
        let offset = address - base;
        let end = offset.checked_add(len as u64)?;
        (len > 0 && end <= *range).then_some((offset, device))
    }
}

/// Locks a device. Devices do not panic; if one did, its state is still the best there is.
fn lock(device: &SharedDevice) -> MutexGuard<'_, dyn BusDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[derive(Default)]
    struct Recorder(Vec<(u64, Vec<u8>)>);

    impl BusDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    #[test]
    fn an_access_reaches_the_device_of_its_range() {
        let device = Arc::new(Mutex::new(Recorder::default()));
        let mut bus = Bus::default();
        bus.insert(0x3f8, 8, device.clone()).unwrap();
        let mut data = [0; 2];
        assert!(bus.read(0x3fa, &mut data));
        assert_eq!(data, [2, 2]);
        assert!(bus.write(0x3ff, &[7]));
        assert_eq!(device.lock().unwrap().0, [(7, vec![7])]);
    }

    #[test]
    fn an_access_outside_or_across_the_end_of_a_range_reaches_none() {
        let mut bus = Bus::default();
        bus.insert(0x3f8, 8, Arc::new(Mutex::new(Recorder::default()))).unwrap();
        for (address, len) in [(0x3f7, 1), (0x400, 1), (0x3ff, 2), (0x3f8, 0), (u64::MAX, 8)] {
            let mut data = vec![0; len];
            assert!(!bus.read(address, &mut data), "{address:#x}+{len}");
            assert!(data.iter().all(|&b| b == 0xff));
            assert!(!bus.write(address, &data));
        }
    }

    #[test]
    fn ranges_that_overlap_are_refused() {
        let device = || Arc::new(Mutex::new(Recorder::default()));
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x1000, device()).unwrap();
        for (base, len) in [(0x1000, 1), (0xfff, 2), (0x1fff, 1), (0, 0x10000), (0, 0), (u64::MAX, 2)] {
            assert!(bus.insert(base, len, device()).is_err(), "{base:#x}+{len:#x}");
        }
        bus.insert(0, 0x1000, device()).unwrap();
        bus.insert(0x2000, 1, device()).unwrap();
        bus.insert(u64::MAX, 1, device()).unwrap();
    }
}
