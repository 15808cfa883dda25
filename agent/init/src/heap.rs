//! The freestanding program's memory allocator: size classes with free lists over memory from mmap(2).
//!
//! It is not for several threads. The agent has one; a child that shares its memory runs only while the agent waits for it
//! (see `child`).
#![allow(unsafe_code)] // An allocator.
use crate::sys;
use core::{
    alloc::{GlobalAlloc, Layout},
    cell::UnsafeCell,
    ptr,
};

/// The smallest class, in bytes: a power of two that can hold a pointer. Alignment of all blocks.
const SMALLEST: usize = 16;
/// The number of classes; the largest is `SMALLEST << (CLASSES - 1)` bytes. Larger blocks are mappings of their own.
const CLASSES: usize = 12;
/// What is asked of the kernel at a time. Its pages cost nothing before they are touched.
const CHUNK_BYTES: usize = 1 << 20;
/// Page size.
const PAGE: usize = 4096;

/// The allocator.
pub struct Heap(UnsafeCell<State>);

struct State {
    free: [*mut u8; CLASSES],
    next: usize,
    end: usize,
}

// SAFETY: used by one thread at a time, as the module's description says.
unsafe impl Sync for Heap {}

impl Default for Heap {
    fn default() -> Self {
        Self::new()
    }
}

impl Heap {
    /// An empty heap.
    #[must_use]
    pub const fn new() -> Self {
        Self(UnsafeCell::new(State { free: [ptr::null_mut(); CLASSES], next: 0, end: 0 }))
    }
}

/// The class of blocks for a layout, or None for a mapping of its own. Blocks are aligned to their size, at most to a page.
fn class(layout: Layout) -> Option<usize> {
    let bytes = layout.size().max(layout.align()).max(SMALLEST).checked_next_power_of_two()?;
    let class = (bytes.trailing_zeros() - SMALLEST.trailing_zeros()) as usize;
    (class < CLASSES && layout.align() <= PAGE).then_some(class)
}

// SAFETY: blocks are unused memory of at least the asked size and alignment, and given once until they are freed.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(class) = class(layout) else {
            // A page's alignment at most: nothing in the agent asks for more.
            return if layout.align() > PAGE { ptr::null_mut() } else { sys::map_memory(layout.size()) };
        };
        // SAFETY: one thread at a time.
        let state = unsafe { &mut *self.0.get() };
        let block = state.free[class];
        if !block.is_null() {
            // SAFETY: free blocks begin with the pointer to the next.
            state.free[class] = unsafe { block.cast::<*mut u8>().read() };
            return block;
        }
        let bytes = SMALLEST << class;
        let start = state.next.next_multiple_of(bytes.min(PAGE));
        if start + bytes <= state.end {
            state.next = start + bytes;
            return start as *mut u8;
        }
        let chunk = sys::map_memory(CHUNK_BYTES);
        if chunk.is_null() {
            return chunk;
        }
        state.next = chunk as usize + bytes;
        state.end = chunk as usize + CHUNK_BYTES;
        chunk
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: one thread at a time.
        let is_new = class(layout).is_none_or(|class| unsafe { &*self.0.get() }.free[class].is_null());
        // SAFETY: the caller's promise is the same.
        let block = unsafe { self.alloc(layout) };
        // Memory from the kernel is zero already, and to touch its pages is what costs.
        if !is_new && !block.is_null() {
            // SAFETY: the block is of that size.
            unsafe { block.write_bytes(0, layout.size()) };
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let Some(class) = class(layout) else {
            sys::unmap_memory(block, layout.size());
            return;
        };
        // SAFETY: one thread at a time.
        let state = unsafe { &mut *self.0.get() };
        // SAFETY: the block is no longer used, and large enough for a pointer.
        unsafe { block.cast::<*mut u8>().write(state.free[class]) };
        state.free[class] = block;
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // SAFETY: the caller's promise: bytes is not zero and does not overflow when rounded up.
        let new = unsafe { Layout::from_size_align_unchecked(bytes, layout.align()) };
        if class(layout).is_some() && class(layout) == class(new) {
            return block;
        }
        // SAFETY: as for alloc; both blocks hold at least the lesser of the sizes; they do not overlap.
        unsafe {
            let other = self.alloc(new);
            if !other.is_null() {
                ptr::copy_nonoverlapping(block, other, layout.size().min(bytes));
                self.dealloc(block, layout);
            }
            other
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_aligned_apart_and_used_again() {
        let heap = Heap::new();
        let mut blocks = Vec::new();
        for (size, align) in
            [(1, 1), (16, 16), (17, 8), (100, 64), (4096, 4096), (40_000, 16), (300_000, 8), (8192, 4096)]
        {
            let layout = Layout::from_size_align(size, align).unwrap();
            // SAFETY: the layout's size is not zero; the block is written within it.
            let block = unsafe { heap.alloc(layout) };
            assert!(!block.is_null() && (block as usize).is_multiple_of(align));
            // SAFETY: within the block.
            unsafe { block.write_bytes(u8::try_from(blocks.len()).unwrap(), size) };
            blocks.push((block, layout));
        }
        for (n, (block, layout)) in blocks.iter().enumerate() {
            // SAFETY: written above.
            let content = unsafe { core::slice::from_raw_parts(*block, layout.size()) };
            assert!(content.iter().all(|byte| usize::from(*byte) == n));
        }
        for (block, layout) in &blocks {
            // SAFETY: allocated above with this layout, freed once.
            unsafe { heap.dealloc(*block, *layout) };
        }
        let (last, layout) = blocks[1];
        // SAFETY: not zero in size.
        assert_eq!(unsafe { heap.alloc(layout) }, if last == blocks[1].0 { last } else { blocks[0].0 });
    }

    #[test]
    fn growing_keeps_the_content() {
        let heap = Heap::new();
        let mut layout = Layout::from_size_align(10, 1).unwrap();
        // SAFETY: sizes are not zero; reads and writes stay within them.
        unsafe {
            let mut block = heap.alloc(layout);
            block.write_bytes(7, 10);
            for size in [12, 17, 300, 70_000, 2_000_000, 20] {
                block = heap.realloc(block, layout, size);
                layout = Layout::from_size_align(size, 1).unwrap();
                assert_eq!(core::slice::from_raw_parts(block, 10), [7; 10]);
            }
        }
    }
}
