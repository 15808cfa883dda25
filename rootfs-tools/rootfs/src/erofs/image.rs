//! From the tree to the image's metadata: directories' blocks, then inodes with their attributes and tails.
//!
//! Directories come first, breadth first, then everything else in the same order, packed into blocks: a path is
//! looked up by reading few blocks.
use super::ConvertError;
use super::data::{DataWriter, read_tail};
use super::format::{
    BLOCK_BYTES, COMPACT_INODE_BYTES, DIRENT_BYTES, DiskInode, EXTENDED_INODE_BYTES, LAYOUT_INLINE, LAYOUT_PLAIN,
    S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, SLOT_BYTES, Superblock, XATTR_HEADER_BYTES, encode_xattr, file_type,
};
use super::tree::{ROOT, Tree};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Blocks that are kept open for small inodes: more would pack better and put neighbours farther apart.
const OPEN_BLOCKS: usize = 16;
const WRITE_BYTES: usize = 256 * 1024;
const OPAQUE_XATTR: (&[u8], &[u8]) = (b"trusted.overlay.opaque", b"y");
const NO_SLOT: u32 = u32::MAX;

/// What remains of the tree, in the order in which it is written.
struct Live {
    /// Live nodes, by parent, then by name.
    sorted: Vec<u32>,
    /// Where each node's children start in `sorted`; one more at the end.
    starts: Vec<u32>,
    /// Inodes' link counts; 0 for dead ones.
    links: Vec<u32>,
}

impl Live {
    fn of(tree: &Tree) -> Self {
        let count = tree.nodes.len();
        let mut live = vec![true; count];
        let mut starts = vec![0u32; count + 1];
        let mut links = vec![0u32; tree.inodes.len()];
        links[ROOT as usize] = 2;
        for index in 1..count {
            let node = &tree.nodes[index];
            live[index] = !node.removed && live[node.parent as usize];
            if !live[index] {
                continue;
            }
            starts[node.parent as usize + 1] += 1;
            links[node.inode as usize] += 1;
            if tree.inodes[node.inode as usize].is_directory() {
                // Its own `.`, and `..` in its parent.
                links[node.inode as usize] += 1;
                links[tree.nodes[node.parent as usize].inode as usize] += 1;
            }
        }
        for index in 0..count {
            starts[index + 1] += starts[index];
        }
        let mut next = starts.clone();
        let mut sorted = vec![0; starts[count] as usize];
        for index in (1..count).filter(|index| live[*index]) {
            let slot = &mut next[tree.nodes[index].parent as usize];
            sorted[*slot as usize] = index as u32;
            *slot += 1;
        }
        for index in 0..count {
            let children = &mut sorted[starts[index] as usize..starts[index + 1] as usize];
            children.sort_unstable_by(|a, b| tree.name(*a).cmp(tree.name(*b)));
        }
        Self { sorted, starts, links }
    }

    fn children(&self, node: u32) -> &[u32] {
        &self.sorted[self.starts[node as usize] as usize..self.starts[node as usize + 1] as usize]
    }

    /// Directories, breadth first.
    fn directories(&self, tree: &Tree) -> Vec<u32> {
        let mut order = vec![ROOT];
        let mut at = 0;
        while at < order.len() {
            let children = self.children(order[at]).iter();
            order.extend(children.filter(|child| tree.inode_of(**child).is_directory()));
            at += 1;
        }
        order
    }
}

/// An entry of a directory on its way to the disk.
struct Dirent<'t> {
    name: &'t [u8],
    inode: u32,
}

/// A directory's entries, `.` and `..` among them, sorted by bytes.
fn dirents<'t>(tree: &'t Tree, live: &Live, directory: u32) -> Vec<Dirent<'t>> {
    let node = &tree.nodes[directory as usize];
    let mut entries = vec![
        Dirent { name: b".", inode: node.inode },
        Dirent { name: b"..", inode: tree.nodes[node.parent as usize].inode },
    ];
    let children = live.children(directory).iter();
    entries.extend(children.map(|child| Dirent { name: tree.name(*child), inode: tree.nodes[*child as usize].inode }));
    // Only what sorts before a dot has to move.
    entries.sort_by(|a, b| a.name.cmp(b.name));
    entries
}

/// Which entries go into which block, and the bytes that they take in it.
fn dirent_blocks(entries: &[Dirent<'_>]) -> Vec<(usize, usize)> {
    let mut blocks = Vec::new();
    let (mut count, mut bytes) = (0, 0);
    for entry in entries {
        let needed = DIRENT_BYTES + entry.name.len();
        if bytes + needed > BLOCK_BYTES {
            blocks.push((count, bytes));
            (count, bytes) = (0, 0);
        }
        count += 1;
        bytes += needed;
    }
    blocks.push((count, bytes));
    blocks
}

fn encode_dirents(entries: &[Dirent<'_>], tree: &Tree, nids: &[u32], out: &mut Vec<u8>) {
    let mut name_at = entries.len() * DIRENT_BYTES;
    for entry in entries {
        out.extend_from_slice(&u64::from(nids[entry.inode as usize]).to_le_bytes());
        out.extend_from_slice(&(name_at as u16).to_le_bytes());
        out.extend_from_slice(&[file_type(tree.inodes[entry.inode as usize].mode), 0]);
        name_at += entry.name.len();
    }
    for entry in entries {
        out.extend_from_slice(entry.name);
    }
}

/// Gives inodes their places: offsets from the start of the metadata.
struct Placer {
    end_block: u64,
    /// Block and bytes used.
    open: Vec<(u64, usize)>,
}

impl Placer {
    fn place(&mut self, len_bytes: usize) -> u64 {
        let len_bytes = len_bytes.next_multiple_of(SLOT_BYTES);
        let fitting = self.open.iter().enumerate().filter(|(_, (_, used))| used + len_bytes <= BLOCK_BYTES);
        // The fullest that has room; the first of those, so that the order does not depend on anything else.
        let best = fitting.max_by_key(|(at, (_, used))| (*used, std::cmp::Reverse(*at))).map(|(at, _)| at);
        if let Some(at) = best {
            let (block, used) = self.open[at];
            self.open[at].1 += len_bytes;
            if used + len_bytes == BLOCK_BYTES {
                self.open.remove(at);
            }
            return block * BLOCK_BYTES as u64 + used as u64;
        }
        let block = self.end_block;
        self.end_block += len_bytes.div_ceil(BLOCK_BYTES) as u64;
        if len_bytes < BLOCK_BYTES {
            self.open.push((block, len_bytes));
            if self.open.len() > OPEN_BLOCKS {
                let fullest =
                    self.open.iter().enumerate().max_by_key(|(at, (_, used))| (*used, std::cmp::Reverse(*at)));
                if let Some(at) = fullest.map(|(at, _)| at) {
                    self.open.remove(at);
                }
            }
        }
        block * BLOCK_BYTES as u64
    }
}

/// The bytes of an inode's extended attributes, with their header; 0 if it has none.
fn xattr_bytes(tree: &Tree, inode: u32) -> usize {
    let inode = &tree.inodes[inode as usize];
    let mut opaque = Vec::new();
    if inode.opaque {
        encode_xattr(OPAQUE_XATTR.0, OPAQUE_XATTR.1, &mut opaque);
    }
    match inode.xattrs_len as usize + opaque.len() {
        0 => 0,
        entries => XATTR_HEADER_BYTES + entries,
    }
}

/// The longest tail that fits beside an inode with `xattr_bytes` of attributes.
pub(super) fn inline_room(xattr_bytes: usize) -> usize {
    BLOCK_BYTES.saturating_sub(EXTENDED_INODE_BYTES + xattr_bytes)
}

/// The time that most inodes have: those need no full inode.
fn common_time(tree: &Tree, live: &Live) -> (i64, u32) {
    let inodes = tree.inodes.iter().zip(&live.links).filter(|(_, links)| **links > 0);
    let mut times: Vec<_> = inodes.map(|(inode, _)| inode.mtime).collect();
    times.sort_unstable();
    let mut best = (0, (0, 0));
    for run in times.chunk_by(|a, b| a == b) {
        if run.len() > best.0 {
            best = (run.len(), run[0]);
        }
    }
    best.1
}

/// Writes everything but file data. Gives the image's length in bytes, and the number of inodes.
pub(super) fn write(
    tree: &mut Tree,
    mut data: DataWriter<'_>,
    image: &File,
    uuid: [u8; 16],
    volume_name: [u8; 16],
) -> Result<(u64, u64), ConvertError> {
    let live = Live::of(tree);
    let directories = live.directories(tree);
    let build_time = common_time(tree, &live);

    // Directories' sizes and blocks.
    let mut next_block = data.next_block();
    let first_directory_block = next_block;
    for directory in &directories {
        let blocks = dirent_blocks(&dirents(tree, &live, *directory));
        let index = tree.nodes[*directory as usize].inode;
        let (_, last_bytes) = blocks[blocks.len() - 1];
        let inline = last_bytes <= inline_room(xattr_bytes(tree, index));
        let whole = (blocks.len() - usize::from(inline)) as u32;
        let inode = &mut tree.inodes[index as usize];
        inode.size_bytes = ((blocks.len() - 1) * BLOCK_BYTES + last_bytes) as u64;
        inode.tail = inline.then_some(0);
        inode.block_or_device = if whole == 0 { 0 } else { next_block };
        next_block = next_block.checked_add(whole).ok_or(ConvertError::TooLarge)?;
    }
    let meta_block = next_block;

    // Inodes' places. Number 0 stays free: some programs take an entry with that inode number for a deleted one.
    let mut nids = vec![NO_SLOT; tree.inodes.len()];
    let mut placed = Vec::with_capacity(tree.inodes.len());
    let mut placer = Placer { end_block: 1, open: vec![(0, SLOT_BYTES)] };
    let mut put = |node: u32| -> Result<(), ConvertError> {
        let index = tree.nodes[node as usize].inode;
        if nids[index as usize] == NO_SLOT {
            let at = placer.place(disk_inode(tree, &live, index, build_time).1);
            nids[index as usize] = u32::try_from(at / SLOT_BYTES as u64)
                .ok()
                .filter(|nid| *nid != NO_SLOT)
                .ok_or(ConvertError::TooLarge)?;
            placed.push(index);
        }
        Ok(())
    };
    for directory in &directories {
        put(*directory)?;
    }
    for directory in &directories {
        for child in live.children(*directory) {
            put(*child)?;
        }
    }
    let mut end_block = u64::from(meta_block) + placer.end_block;

    // Directories' whole blocks.
    let mut bytes = Vec::new();
    for directory in &directories {
        for block in directory_blocks(tree, &live, &nids, *directory).iter().take_while(|block| block.whole) {
            bytes.clear();
            bytes.extend_from_slice(&block.bytes);
            bytes.resize(BLOCK_BYTES, 0);
            data.append(&bytes)?;
        }
    }
    debug_assert!(data.next_block() >= first_directory_block && data.next_block() == meta_block);
    let spool = data.finish()?;

    // Inodes, in the order of their places.
    let mut directory_of = vec![];
    directory_of.extend(directories.iter().map(|node| (tree.nodes[*node as usize].inode, *node)));
    directory_of.sort_unstable();
    placed.sort_unstable_by_key(|index| nids[*index as usize]);
    let mut writer = MetaWriter { image, start: u64::from(meta_block) * BLOCK_BYTES as u64, bytes: Vec::new() };
    for (number, index) in placed.iter().enumerate() {
        writer
            .seek(u64::from(meta_block) * BLOCK_BYTES as u64 + u64::from(nids[*index as usize]) * SLOT_BYTES as u64)?;
        let (mut disk, _) = disk_inode(tree, &live, *index, build_time);
        disk.number = number as u32 + 1;
        disk.encode(&mut writer.bytes);
        let inode = &tree.inodes[*index as usize];
        if disk.xattr_bytes > 0 {
            writer.bytes.extend_from_slice(&[0; XATTR_HEADER_BYTES]);
            writer.bytes.extend_from_slice(tree.text(inode.xattrs_at, inode.xattrs_len));
            if inode.opaque {
                encode_xattr(OPAQUE_XATTR.0, OPAQUE_XATTR.1, &mut writer.bytes);
            }
        }
        if disk.layout != LAYOUT_INLINE {
            continue;
        }
        match inode.mode & S_IFMT {
            S_IFLNK => writer.bytes.extend_from_slice(tree.text(inode.target_at, inode.size_bytes as u32)),
            S_IFDIR => {
                if let Ok(at) = directory_of.binary_search_by_key(index, |(inode, _)| *inode) {
                    let blocks = directory_blocks(tree, &live, &nids, directory_of[at].1);
                    let tail = blocks.last().map_or(&[][..], |block| &block.bytes);
                    writer.bytes.extend_from_slice(tail);
                }
            }
            _ => {
                let start = writer.bytes.len();
                writer.bytes.resize(start + (inode.size_bytes % BLOCK_BYTES as u64) as usize, 0);
                read_tail(spool, inode.tail.unwrap_or(0), &mut writer.bytes[start..])?;
            }
        }
    }
    writer.flush()?;
    if writer.start == end_block * BLOCK_BYTES as u64 {
        // fsck.erofs looks for attributes behind every inode, also the last one.
        end_block += 1;
    }
    let blocks = u32::try_from(end_block).map_err(|_| ConvertError::TooLarge)?;
    let len_bytes = end_block * BLOCK_BYTES as u64;
    let superblock = Superblock {
        // The root is placed first: in the first or the second block.
        root_nid: nids[ROOT as usize] as u16,
        inodes: placed.len() as u64,
        build_time,
        blocks,
        meta_block,
        uuid,
        volume_name,
    };
    image
        .set_len(len_bytes)
        .and_then(|()| image.write_all_at(&superblock.block(), 0))
        .map_err(|source| ConvertError::Write { source })?;
    Ok((len_bytes, placed.len() as u64))
}

/// A directory's block as it is written.
struct DirectoryBlock {
    bytes: Vec<u8>,
    /// In a block of its own, not beside the inode.
    whole: bool,
}

fn directory_blocks(tree: &Tree, live: &Live, nids: &[u32], directory: u32) -> Vec<DirectoryBlock> {
    let entries = dirents(tree, live, directory);
    let inline = tree.inode_of(directory).tail.is_some();
    let sizes = dirent_blocks(&entries);
    let mut start = 0;
    let mut blocks = Vec::with_capacity(sizes.len());
    for (at, (count, len)) in sizes.iter().enumerate() {
        let mut bytes = Vec::with_capacity(*len);
        encode_dirents(&entries[start..start + count], tree, nids, &mut bytes);
        start += count;
        blocks.push(DirectoryBlock { bytes, whole: !inline || at + 1 < sizes.len() });
    }
    blocks
}

/// An inode as it is written, but for its number; and the bytes that it takes with its attributes and its tail.
fn disk_inode(tree: &Tree, live: &Live, index: u32, build_time: (i64, u32)) -> (DiskInode, usize) {
    let inode = &tree.inodes[index as usize];
    let links = live.links[index as usize];
    let xattr_bytes = xattr_bytes(tree, index);
    let small = |value: u32| u16::try_from(value).is_ok();
    let compact = small(inode.uid)
        && small(inode.gid)
        && small(links)
        && u32::try_from(inode.size_bytes).is_ok()
        && inode.mtime == build_time;
    let inline_bytes = match inode.mode & S_IFMT {
        S_IFREG | S_IFDIR if inode.tail.is_some() => (inode.size_bytes % BLOCK_BYTES as u64) as usize,
        // Targets that do not fit were written as data.
        S_IFLNK if inode.block_or_device == 0 => inode.size_bytes as usize,
        _ => 0,
    };
    // A directory's tail may be a whole block.
    let disk = DiskInode {
        extended: !compact,
        layout: if inline_bytes > 0 { LAYOUT_INLINE } else { LAYOUT_PLAIN },
        xattr_bytes,
        mode: inode.mode,
        links,
        size_bytes: inode.size_bytes,
        block_or_device: inode.block_or_device,
        number: 0,
        uid: inode.uid,
        gid: inode.gid,
        mtime: inode.mtime,
    };
    let inode_bytes = if compact { COMPACT_INODE_BYTES } else { EXTENDED_INODE_BYTES };
    (disk, inode_bytes + xattr_bytes + inline_bytes)
}

/// Writes the metadata from front to back.
struct MetaWriter<'a> {
    image: &'a File,
    /// Where the first of `bytes` belongs.
    start: u64,
    bytes: Vec<u8>,
}

impl MetaWriter<'_> {
    /// Fills up to an offset with zeroes.
    fn seek(&mut self, offset: u64) -> Result<(), ConvertError> {
        if self.bytes.len() >= WRITE_BYTES {
            self.flush()?;
        }
        self.bytes.resize((offset - self.start) as usize, 0);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), ConvertError> {
        self.image.write_all_at(&self.bytes, self.start).map_err(|source| ConvertError::Write { source })?;
        self.start += self.bytes.len() as u64;
        self.bytes.clear();
        Ok(())
    }
}
