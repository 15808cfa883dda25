//! The entropy device (virtio 1.2 §5.4): the guest's buffers are filled from the host's
//! `getrandom`.

#[cfg(test)]
mod tests;

use vm_memory::GuestMemoryMmap;

use super::{DeviceError, QueueError, Running, VirtioDevice, Virtqueue, Work};

/// virtio 1.2 §5.4.1.
const DEVICE_TYPE: u32 = 4;
/// One request queue. Linux has one request in flight.
const QUEUE_SIZES: [u16; 1] = [8];
/// The most bytes that one request gets; Linux asks for 64 or a page.
const MAX_REQUEST_BYTES: u64 = 4096;
/// The most requests of one notification.
const REQUEST_BUDGET: usize = 8;

/// The entropy device.
#[derive(Default)]
pub struct Rng {
    running: Option<Running>,
}

impl Rng {
    /// A stopped one.
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_bytes(&[], offset, data);
    }

    fn start(&mut self, running: Running) -> Result<(), DeviceError> {
        self.running = Some(running);
        Ok(())
    }

    fn stop(&mut self) -> Vec<Virtqueue> {
        self.running.take().map_or_else(Vec::new, |r| r.queues)
    }

    fn queue_notified(&mut self, index: usize) -> Work {
        let Some(running) = &mut self.running else {
            return Work::Done;
        };
        if index != 0 {
            return Work::Done;
        }
        let work = match serve(running) {
            Ok(work) => work,
            Err(_) => {
                running.interrupt.needs_reset();
                Work::Done
            }
        };
        running.interrupt_queue(0);
        work
    }
}

fn serve(running: &mut Running) -> Result<Work, QueueError> {
    let memory = &running.memory;
    let Some(queue) = running.queues.first_mut() else {
        return Ok(Work::Done);
    };
    for _ in 0..REQUEST_BUDGET {
        let Some(mut chain) = queue.pop(memory)? else {
            if queue.enable_notification(memory)? {
                continue;
            }
            return Ok(Work::Done);
        };
        let len = chain.writable.len_bytes().min(MAX_REQUEST_BYTES);
        let len = fill(&chain.writable.split_front(len)?, memory)?;
        queue.push(memory, chain.head, len)?;
    }
    Ok(Work::More)
}

/// Fills `buffers`, at most [`MAX_REQUEST_BYTES`] of them; says how much.
fn fill(buffers: &super::Buffers, memory: &GuestMemoryMmap) -> Result<u32, QueueError> {
    let mut bytes = vec![0; buffers.len_bytes() as usize];
    let mut len = 0;
    while len < bytes.len() {
        // It fails on a host without entropy only, which has not booted then. The driver takes
        // less than it asked for as an answer.
        match rustix::rand::getrandom(&mut bytes[len..], rustix::rand::GetRandomFlags::empty()) {
            Ok(more) => len += more,
            Err(_) => break,
        }
    }
    buffers.write(memory, &bytes[..len])?;
    Ok(len as u32)
}
