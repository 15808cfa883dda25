//! The device: features, configuration space, life cycle and queue.

use std::fs::File;
use std::io::{Seek, SeekFrom};

use serde::{Deserialize, Serialize};

use super::request::{self, Medium, SECTOR_BYTES};
use crate::virtio::{DeviceError, QueueError, Running, VirtioDevice, Virtqueue, Work, read_config_bytes};

/// virtio 1.2 §5.2.1.
const DEVICE_TYPE: u32 = 2;
const QUEUE_SIZE: u16 = 128;
const QUEUE_SIZES: [u16; 1] = [QUEUE_SIZE];

/// Features (virtio 1.2 §5.2.3).
const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// The most segments of a request: header and status take a descriptor each.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// The most bytes of a segment. With [`SEG_MAX`], it keeps a request below [`request::MAX_BYTES`].
const SIZE_MAX: u32 = 128 << 10;
const _: () = assert!(SEG_MAX as u64 * SIZE_MAX as u64 <= request::MAX_BYTES);

/// The most requests that are served before other devices have their turn.
const REQUEST_BUDGET: usize = 64;
/// The same in bytes.
const BYTE_BUDGET: u64 = 32 << 20;

/// A disk.
pub struct Block {
    medium: Medium,
    running: Option<Running>,
    /// The capacity is another than the driver was told: tell it at the start.
    changed: bool,
}

/// What the guest knows of the disk.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    read_only: bool,
    capacity_sectors: u64,
}

impl Block {
    /// A disk with the content of `medium`, which is open for writing unless `read_only`; without
    /// one, it is a stub. Whether it is read-only never changes, not even over a snapshot.
    ///
    /// A writable medium that does not end on a sector loses what is past its last whole one; a
    /// read-only one reads zeroes there.
    ///
    /// # Errors
    /// The length of the medium cannot be found out.
    pub fn new(medium: Option<File>, read_only: bool) -> Result<Self, DeviceError> {
        let len_bytes = match &medium {
            None => 0,
            Some(file) => {
                let mut file: &File = file;
                file.seek(SeekFrom::End(0)).map_err(|source| DeviceError::Host {
                    device: "block",
                    action: "find the length of its medium".into(),
                    source,
                })?
            }
        };
        let capacity_sectors = if read_only { len_bytes.div_ceil(SECTOR_BYTES) } else { len_bytes / SECTOR_BYTES };
        Ok(Self { medium: Medium { file: medium, read_only, capacity_sectors }, running: None, changed: false })
    }

    /// The configuration space (virtio 1.2 §5.2.4).
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |offset: usize, bytes: &[u8]| {
            config[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &self.medium.capacity_sectors.to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        if !self.medium.read_only {
            put(36, &request::MAX_RANGE_SECTORS.to_le_bytes());
            put(40, &request::MAX_RANGES.to_le_bytes());
            put(44, &1_u32.to_le_bytes()); // discard_sector_alignment
            put(48, &request::MAX_RANGE_SECTORS.to_le_bytes());
            put(52, &request::MAX_RANGES.to_le_bytes());
            put(56, &[1]); // write_zeroes_may_unmap
        }
        config
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        let common = F_SIZE_MAX | F_SEG_MAX;
        if self.medium.read_only { common | F_RO } else { common | F_FLUSH | F_DISCARD | F_WRITE_ZEROES }
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn start(&mut self, running: Running) -> Result<(), DeviceError> {
        if std::mem::take(&mut self.changed) {
            running.interrupt.config_changed();
        }
        self.running = Some(running);
        Ok(())
    }

    fn stop(&mut self) -> Vec<Virtqueue> {
        self.running.take().map_or_else(Vec::new, |r| r.queues)
    }

    fn reset(&mut self) {
        self.changed = false;
    }

    fn queue_notified(&mut self, index: usize) -> Work {
        let Some(running) = &mut self.running else {
            return Work::Done;
        };
        if index != 0 {
            return Work::Done;
        }
        let work = match serve(&self.medium, running) {
            Ok(work) => work,
            Err(_) => {
                running.interrupt.needs_reset();
                Work::Done
            }
        };
        running.interrupt_queue(0);
        work
    }

    fn save(&self) -> serde_json::Value {
        serde_json::json!(State { read_only: self.medium.read_only, capacity_sectors: self.medium.capacity_sectors })
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), DeviceError> {
        let refuse = |problem: String| DeviceError::State { device: "block", problem };
        let state = State::deserialize(state).map_err(|error| refuse(error.to_string()))?;
        if state.read_only != self.medium.read_only {
            return Err(refuse("a disk cannot become read-only or writable in a restored machine".into()));
        }
        self.changed = state.capacity_sectors != self.medium.capacity_sectors;
        Ok(())
    }
}

fn serve(medium: &Medium, running: &mut Running) -> Result<Work, QueueError> {
    let memory = &running.memory;
    let Some(queue) = running.queues.first_mut() else {
        return Ok(Work::Done);
    };
    queue.disable_notification(memory)?;
    let mut requests = 0;
    let mut bytes = 0;
    while requests < REQUEST_BUDGET && bytes < BYTE_BUDGET {
        let Some(chain) = queue.pop(memory)? else {
            if queue.enable_notification(memory)? {
                continue;
            }
            return Ok(Work::Done);
        };
        requests += 1;
        bytes += chain.readable.len_bytes() + chain.writable.len_bytes();
        let head = chain.head;
        let len = request::serve(medium, memory, chain)?;
        queue.push(memory, head, len)?;
    }
    Ok(Work::More)
}
