//! A driver of one device: its queues are laid out in a small memory, and the turns of the event
//! loop are taken by the test.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::virtio::transport::{TransportState, feature, status};
use crate::virtio::{MmioTransport, VirtioDevice};

/// Two regions with a hole between them, so that a buffer can cross a border.
const REGION_BYTES: usize = 4 << 20;
pub(crate) const HOLE: u64 = REGION_BYTES as u64;
pub(crate) const SECOND_REGION: u64 = 16 << 20;
/// What the rings of one queue take, at most: 1024 descriptors.
const RINGS_BYTES: u64 = 64 << 10;
/// Where buffers are allocated from.
const BUFFERS: u64 = 1 << 20;
/// How long a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(120);

/// One descriptor of a chain to be made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Desc {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) writable: bool,
}

/// A chain that the device gave back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Used {
    pub(crate) head: u16,
    pub(crate) len: u32,
}

#[derive(Clone, Copy, Debug)]
struct Ring {
    size: u16,
    base: u64,
    next_desc: u16,
    next_avail: u16,
    next_used: u16,
}

impl Ring {
    fn desc(&self) -> u64 {
        self.base
    }
    fn avail(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }
    fn used(&self) -> u64 {
        // Aligned generously.
        self.base + 0x8000
    }
}

pub(crate) struct Driver {
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) transport: MmioTransport,
    irq: EventFd,
    rings: Vec<Ring>,
    next_buffer: u64,
}

pub(crate) fn deadline_passed(since: Instant) -> bool {
    since.elapsed() > PATIENCE
}

pub(crate) fn new_memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), REGION_BYTES), (GuestAddress(SECOND_REGION), REGION_BYTES)])
        .unwrap()
}

impl Driver {
    pub(crate) fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::with_memory(device, new_memory())
    }

    pub(crate) fn with_memory(device: Box<dyn VirtioDevice>, memory: GuestMemoryMmap) -> Self {
        let irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let transport = MmioTransport::new(device, memory.clone(), irq.try_clone().unwrap()).unwrap();
        Self { memory, transport, irq, rings: Vec::new(), next_buffer: BUFFERS }
    }

    /// With the device ready: what nearly every test begins with.
    pub(crate) fn started(device: Box<dyn VirtioDevice>) -> Self {
        let mut driver = Self::new(device);
        driver.start(u64::MAX);
        driver
    }

    /// This machine's memory and rings with another device: a restore in another process.
    pub(crate) fn restored(
        &self,
        device: Box<dyn VirtioDevice>,
        state: &TransportState,
    ) -> Result<Self, crate::virtio::TransportError> {
        let memory = new_memory();
        let mut bytes = vec![0; REGION_BYTES];
        for base in [0, SECOND_REGION] {
            self.memory.read_slice(&mut bytes, GuestAddress(base)).unwrap();
            memory.write_slice(&bytes, GuestAddress(base)).unwrap();
        }
        let mut driver = Self::with_memory(device, memory);
        driver.rings.clone_from(&self.rings);
        driver.next_buffer = self.next_buffer;
        driver.transport.restore(state)?;
        driver.transport.resume()?;
        Ok(driver)
    }

    pub(crate) fn read(&mut self, register: u64) -> u32 {
        let mut data = [0xaa; 4];
        self.transport.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn write(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    pub(crate) fn status(&mut self) -> u32 {
        self.read(0x70)
    }

    pub(crate) fn needs_reset(&mut self) -> bool {
        self.status() & status::NEEDS_RESET != 0
    }

    pub(crate) fn config(&mut self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.transport.read(0x100 + offset, &mut data);
        data
    }

    pub(crate) fn features(&mut self) -> u64 {
        self.write(0x14, 0);
        let low = self.read(0x10);
        self.write(0x14, 1);
        u64::from(low) | u64::from(self.read(0x10)) << 32
    }

    /// As Linux does it: reset, acknowledge, features (those of `mask`), queues, ready.
    pub(crate) fn start(&mut self, mask: u64) {
        self.negotiate(mask);
        self.set_up_queues();
        let status = self.status();
        self.write(0x70, status | status::DRIVER_OK);
        assert_eq!(self.status(), status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK);
    }

    pub(crate) fn negotiate(&mut self, mask: u64) {
        self.write(0x70, 0);
        assert_eq!(self.status(), 0);
        self.write(0x70, status::ACKNOWLEDGE);
        self.write(0x70, status::ACKNOWLEDGE | status::DRIVER);
        let features = self.features() & (mask | feature::VERSION_1);
        self.write(0x24, 0);
        self.write(0x20, features as u32);
        self.write(0x24, 1);
        self.write(0x20, (features >> 32) as u32);
        let status = self.status() | status::FEATURES_OK;
        self.write(0x70, status);
        assert_eq!(self.status(), status);
    }

    pub(crate) fn set_up_queues(&mut self) {
        self.rings.clear();
        self.next_buffer = BUFFERS;
        for index in 0_u32.. {
            self.write(0x30, index);
            let size = self.read(0x34);
            if size == 0 {
                break;
            }
            let ring = Ring {
                size: size as u16,
                base: RINGS_BYTES * u64::from(index),
                next_desc: 0,
                next_avail: 0,
                next_used: 0,
            };
            let zeroes = vec![0; RINGS_BYTES as usize];
            self.memory.write_slice(&zeroes, GuestAddress(ring.base)).unwrap();
            assert_eq!(self.read(0x44), 0);
            self.write(0x38, size);
            for (register, address) in [(0x80, ring.desc()), (0x90, ring.avail()), (0xa0, ring.used())] {
                self.write(register, address as u32);
                self.write(register + 4, (address >> 32) as u32);
            }
            self.write(0x44, 1);
            assert_eq!(self.read(0x44), 1);
            self.rings.push(ring);
        }
    }

    pub(crate) fn queue_count(&self) -> usize {
        self.rings.len()
    }

    pub(crate) fn queue_size(&self, queue: usize) -> u16 {
        self.rings[queue].size
    }

    /// Fresh memory for a buffer. Wraps around after 3 MiB.
    pub(crate) fn allocate(&mut self, len: usize) -> u64 {
        let len = (len as u64).next_multiple_of(16);
        if self.next_buffer + len > HOLE {
            self.next_buffer = BUFFERS;
        }
        assert!(self.next_buffer + len <= HOLE);
        let address = self.next_buffer;
        self.next_buffer += len;
        address
    }

    pub(crate) fn readable(&mut self, bytes: &[u8]) -> Desc {
        let address = self.allocate(bytes.len());
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
        Desc { address, len: bytes.len() as u32, writable: false }
    }

    pub(crate) fn writable(&mut self, len: usize) -> Desc {
        let address = self.allocate(len);
        let pattern = vec![0xee; len];
        self.memory.write_slice(&pattern, GuestAddress(address)).unwrap();
        Desc { address, len: len as u32, writable: true }
    }

    pub(crate) fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Writes a raw descriptor into the table of `queue`.
    pub(crate) fn raw_desc(&self, queue: usize, index: u16, desc: Desc, flags: u16, next: u16) {
        let ring = &self.rings[queue];
        self.table_entry(ring.desc() + 16 * u64::from(index % ring.size), desc, flags, next);
    }

    /// Writes a descriptor anywhere: an indirect table.
    pub(crate) fn table_entry(&self, at: u64, desc: Desc, flags: u16, next: u16) {
        let flags = flags | if desc.writable { 2 } else { 0 };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&desc.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&desc.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Makes the chain that begins at descriptor `head` available, whatever it is.
    pub(crate) fn publish(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = ring.avail() + 4 + 2 * u64::from(ring.next_avail % ring.size);
        ring.next_avail = ring.next_avail.wrapping_add(1);
        let index = ring.next_avail;
        let avail = ring.avail();
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_avail_index(avail, index);
    }

    fn set_avail_index(&self, avail: u64, index: u16) {
        self.memory.write_obj(index, GuestAddress(avail + 2)).unwrap();
    }

    /// Says that more chains are available than can be.
    pub(crate) fn overrun(&mut self, queue: usize) {
        let ring = self.rings[queue];
        let index = ring.next_avail.wrapping_add(ring.size).wrapping_add(1);
        self.set_avail_index(ring.avail(), index);
    }

    /// Makes a chain of `descs` available; the test keeps fewer in flight than the queue holds.
    pub(crate) fn add(&mut self, queue: usize, descs: &[Desc]) -> u16 {
        let size = self.rings[queue].size;
        let first = self.rings[queue].next_desc;
        for (i, desc) in descs.iter().enumerate() {
            let index = first.wrapping_add(i as u16) % size;
            let last = i + 1 == descs.len();
            let flags = if last { 0 } else { 1 };
            self.raw_desc(queue, index, *desc, flags, (index + 1) % size);
        }
        self.rings[queue].next_desc = first.wrapping_add(descs.len() as u16) % size;
        self.publish(queue, first % size);
        first % size
    }

    /// The chains that the device gave back since the last call.
    pub(crate) fn used(&mut self, queue: usize) -> Vec<Used> {
        let mut all = Vec::new();
        let ring = &mut self.rings[queue];
        let used = ring.used();
        let index: u16 = self.memory.read_obj(GuestAddress(used + 2)).unwrap();
        while ring.next_used != index {
            let slot = used + 4 + 8 * u64::from(ring.next_used % ring.size);
            let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
            let len: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
            all.push(Used { head: head as u16, len });
            ring.next_used = ring.next_used.wrapping_add(1);
        }
        // used_event: the next one shall interrupt.
        let event = ring.avail() + 4 + 2 * u64::from(ring.size);
        let next = ring.next_used;
        self.memory.write_obj(next, GuestAddress(event)).unwrap();
        all
    }

    /// The available index after which the device wants to be notified.
    pub(crate) fn avail_event(&self, queue: usize) -> u16 {
        let ring = &self.rings[queue];
        let address = ring.used() + 4 + 8 * u64::from(ring.size);
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    /// Whether an interrupt came since the last call; acknowledges it, and gives its status.
    pub(crate) fn interrupt(&mut self) -> Option<u32> {
        self.irq.read().ok()?;
        let status = self.read(0x60);
        self.write(0x64, status);
        Some(status)
    }

    /// Notifies through the register.
    pub(crate) fn kick(&mut self, queue: usize) {
        self.write(0x50, queue as u32);
        self.turn();
    }

    /// Takes what is ready now of the event loop's work. False if there was nothing.
    pub(crate) fn turn(&mut self) -> bool {
        self.turn_within(0)
    }

    /// The same, and waits so many milliseconds for something to do.
    pub(crate) fn turn_within(&mut self, milliseconds: i64) -> bool {
        use std::os::fd::AsRawFd;
        let mut fds: Vec<_> = (self.transport.queue_events().iter()).map(AsRawFd::as_raw_fd).collect();
        let queues = fds.len();
        fds.extend(self.transport.poll_fd());
        let mut polled: Vec<_> = fds
            .iter()
            .map(|fd| {
                // SAFETY: the transport holds them open.
                #[allow(unsafe_code)]
                let fd = unsafe { BorrowedFd::borrow_raw(*fd) };
                PollFd::from_borrowed_fd(fd, PollFlags::IN)
            })
            .collect();
        let timeout = rustix::event::Timespec { tv_sec: milliseconds / 1000, tv_nsec: milliseconds % 1000 * 1_000_000 };
        poll(&mut polled, Some(&timeout)).unwrap();
        let ready: Vec<_> = (polled.iter().map(|p| !p.revents().is_empty())).collect();
        drop(polled);
        for (index, _) in ready.iter().enumerate().filter(|(_, ready)| **ready) {
            if index < queues {
                self.transport.queue_event(index);
            } else {
                self.transport.device_event();
            }
        }
        ready.contains(&true)
    }

    /// Turns the event loop until `done` gives something.
    pub(crate) fn wait_for<T>(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        let begin = Instant::now();
        loop {
            if let Some(result) = done(self) {
                return result;
            }
            assert!(!deadline_passed(begin), "waited in vain for {what}");
            self.turn_within(10);
        }
    }

    /// Turns until nothing is left to do, and fails if that never is.
    pub(crate) fn settle(&mut self) {
        for _ in 0..100_000 {
            if !self.turn() {
                return;
            }
        }
        panic!("the device never comes to rest");
    }
}
