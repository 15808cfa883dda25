//! A virtqueue as the devices see it: whole descriptor chains, checked.
//!
//! `virtio-queue` walks the rings and the tables; what is added here is that a chain either is
//! well-formed as a whole, or the driver is broken. No device sees half a chain.

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

/// The most descriptors of one chain. Linux's drivers stay below the queue size and 256 pages; a
/// hostile indirect table could name 65535.
const MAX_CHAIN_DESCRIPTORS: usize = 1024;

/// The driver broke the rules of the virtqueue (virtio 1.2 §2.7).
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The rings do not make sense, or are not in memory.
    #[error("the rings of the virtqueue are not usable")]
    Ring(#[source] virtio_queue::Error),
    /// A chain has no end, no beginning, or one of its tables is not in memory.
    #[error("a descriptor chain is cut off, loops, or has more than {MAX_CHAIN_DESCRIPTORS} links")]
    Chain,
    /// A buffer is not in the guest's memory.
    #[error("a descriptor names {len} bytes at {address:#x}, which is not memory")]
    Address {
        /// Where.
        address: u64,
        /// How many bytes.
        len: u32,
    },
    /// A buffer for the driver to write follows one for the device.
    #[error("a readable descriptor follows a writable one")]
    Order,
    /// A buffer is shorter than what must be in it.
    #[error("a buffer of {len} bytes is too short for {wanted}")]
    Short {
        /// What there is.
        len: u64,
        /// What there must be.
        wanted: u64,
    },
}

/// A piece of guest memory. It was checked to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins.
    pub address: GuestAddress,
    /// Its length in bytes; never 0.
    pub len: u32,
}

/// Pieces of guest memory that together are one buffer.
#[derive(Clone, Debug, Default)]
pub struct Buffers {
    segments: Vec<Segment>,
    len_bytes: u64,
}

impl Buffers {
    /// How many bytes it holds.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    /// The pieces, in order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Cuts the first `len` bytes off, and gives them.
    pub fn split_front(&mut self, len: u64) -> Result<Buffers, QueueError> {
        if len > self.len_bytes {
            return Err(QueueError::Short { len: self.len_bytes, wanted: len });
        }
        let mut front = Buffers::default();
        let mut whole = 0;
        for segment in &mut self.segments {
            let left = len - front.len_bytes;
            if left == 0 {
                break;
            }
            if u64::from(segment.len) <= left {
                front.push(*segment);
                whole += 1;
            } else {
                // It is less than the segment's length, which is a u32.
                let cut = left as u32;
                front.push(Segment { address: segment.address, len: cut });
                segment.address = segment.address.unchecked_add(left);
                segment.len -= cut;
            }
        }
        self.segments.drain(..whole);
        self.len_bytes -= len;
        Ok(front)
    }

    /// Cuts the last `len` bytes off, and gives them.
    pub fn split_back(&mut self, len: u64) -> Result<Buffers, QueueError> {
        let front_len =
            self.len_bytes.checked_sub(len).ok_or(QueueError::Short { len: self.len_bytes, wanted: len })?;
        let front = self.split_front(front_len)?;
        Ok(std::mem::replace(self, front))
    }

    /// Reads the first bytes of it: exactly as many as `data` has.
    pub fn read(&self, memory: &GuestMemoryMmap, data: &mut [u8]) -> Result<(), QueueError> {
        let wanted = data.len();
        let mut rest = data;
        for segment in &self.segments {
            if rest.is_empty() {
                break;
            }
            let len = rest.len().min(segment.len as usize);
            let (part, tail) = rest.split_at_mut(len);
            memory.read_slice(part, segment.address).map_err(|_| segment.fault())?;
            rest = tail;
        }
        self.whole(rest.is_empty(), wanted)
    }

    /// Writes all of `data` to its first bytes.
    pub fn write(&self, memory: &GuestMemoryMmap, data: &[u8]) -> Result<(), QueueError> {
        let mut rest = data;
        for segment in &self.segments {
            if rest.is_empty() {
                break;
            }
            let (part, tail) = rest.split_at(rest.len().min(segment.len as usize));
            memory.write_slice(part, segment.address).map_err(|_| segment.fault())?;
            rest = tail;
        }
        self.whole(rest.is_empty(), data.len())
    }

    fn whole(&self, whole: bool, wanted: usize) -> Result<(), QueueError> {
        if whole {
            return Ok(());
        }
        Err(QueueError::Short { len: self.len_bytes, wanted: wanted as u64 })
    }

    fn push(&mut self, segment: Segment) {
        self.segments.push(segment);
        self.len_bytes += u64::from(segment.len);
    }
}

impl Segment {
    fn fault(&self) -> QueueError {
        QueueError::Address { address: self.address.raw_value(), len: self.len }
    }
}

/// A descriptor chain that the driver made available.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    /// What names it in the used ring.
    pub head: u16,
    /// What the driver wrote for the device.
    pub readable: Buffers,
    /// Where the device may write.
    pub writable: Buffers,
}

/// A virtqueue, used by one device at a time.
#[derive(Debug)]
pub struct Virtqueue {
    queue: Queue,
    /// Whether chains were given back since the last look at [`Virtqueue::needs_interrupt`].
    unannounced: bool,
}

impl Virtqueue {
    pub(super) fn new(queue: Queue) -> Self {
        Self { queue, unannounced: false }
    }

    pub(super) fn queue(&self) -> &Queue {
        &self.queue
    }

    pub(super) fn queue_mut(&mut self) -> &mut Queue {
        &mut self.queue
    }

    pub(super) fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// The next chain that the driver made available, if there is one.
    pub fn pop(&mut self, memory: &GuestMemoryMmap) -> Result<Option<Chain>, QueueError> {
        if !self.queue.ready() {
            return Ok(None);
        }
        let next = self.queue.iter(memory).map_err(QueueError::Ring)?.next();
        let Some(descriptors) = next else {
            return Ok(None);
        };
        let mut chain = Chain { head: descriptors.head_index(), ..Chain::default() };
        let mut count = 0;
        let mut ended = false;
        for descriptor in descriptors {
            count += 1;
            if count > MAX_CHAIN_DESCRIPTORS {
                return Err(QueueError::Chain);
            }
            ended = !descriptor.has_next();
            let segment = Segment { address: descriptor.addr(), len: descriptor.len() };
            if segment.len == 0 {
                continue;
            }
            let writable = descriptor.is_write_only();
            let access = if writable { Permissions::Write } else { Permissions::Read };
            if !memory.check_range(segment.address, segment.len as usize, access) {
                return Err(segment.fault());
            }
            if writable {
                chain.writable.push(segment);
            } else if chain.writable.is_empty() {
                chain.readable.push(segment);
            } else {
                return Err(QueueError::Order);
            }
        }
        // The walk ends early, without a word, where a table or an index is wrong.
        if !ended {
            return Err(QueueError::Chain);
        }
        Ok(Some(chain))
    }

    /// Gives the last chain back as if it had not been taken. Only right after a [`Self::pop`]
    /// that gave one.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain to the driver, with `len` bytes written to it.
    pub fn push(&mut self, memory: &GuestMemoryMmap, head: u16, len: u32) -> Result<(), QueueError> {
        self.unannounced = true;
        self.queue.add_used(memory, head, len).map_err(QueueError::Ring)
    }

    /// Asks the driver to notify from now on. True if it has made chains available meanwhile, for
    /// which no notification may come.
    pub fn enable_notification(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        if !self.queue.ready() {
            return Ok(false);
        }
        self.queue.enable_notification(memory).map_err(QueueError::Ring)
    }

    /// Asks the driver to notify as soon as it makes more available than it has now, though not all of
    /// that was taken. Gives the available index of now.
    pub(super) fn notify_of_more(&mut self, memory: &GuestMemoryMmap) -> Result<u16, QueueError> {
        let available = self.queue.avail_idx(memory, Ordering::Acquire);
        let available = available.map_err(QueueError::Ring)?.0;
        self.enable_notification(memory)?;
        if self.queue.event_idx_enabled() {
            // avail_event follows the used ring (virtio 1.2 §2.7.10).
            let offset = 4 + 8 * u64::from(self.queue.size());
            let address = GuestAddress(self.queue.used_ring())
                .checked_add(offset)
                .ok_or(QueueError::Ring(virtio_queue::Error::AddressOverflow))?;
            memory
                .store(available.to_le(), address, Ordering::SeqCst)
                .map_err(|error| QueueError::Ring(virtio_queue::Error::GuestMemory(error)))?;
        }
        Ok(available)
    }

    /// Asks the driver not to notify: the device looks by itself.
    pub fn disable_notification(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        if !self.queue.ready() {
            return Ok(());
        }
        self.queue.disable_notification(memory).map_err(QueueError::Ring)
    }

    /// Whether chains were given back that the driver wants an interrupt for.
    pub(super) fn needs_interrupt(&mut self, memory: &GuestMemoryMmap) -> bool {
        if !self.queue.ready() || !std::mem::take(&mut self.unannounced) {
            return false;
        }
        // `virtio-queue` knows of EVENT_IDX only; without it the driver has a flag.
        if !self.queue.event_idx_enabled()
            && let Ok(flags) = memory.load::<u16>(GuestAddress(self.queue.avail_ring()), Ordering::SeqCst)
            && u16::from_le(flags) & AVAIL_NO_INTERRUPT != 0
        {
            return false;
        }
        self.queue.needs_notification(memory).unwrap_or(true)
    }
}

/// Flag of the available ring: the driver polls (virtio 1.2 §2.7.6).
const AVAIL_NO_INTERRUPT: u16 = 1;
