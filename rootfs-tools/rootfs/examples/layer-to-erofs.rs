//! Converts a layer's tar stream (standard input) to an EROFS image: `layer-to-erofs IMAGE < LAYER.tar`.
use caisson_rootfs::erofs::{Options, convert};
use std::fs::File;
use std::io;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = PathBuf::from(std::env::args_os().nth(1).ok_or("usage: layer-to-erofs IMAGE < LAYER.tar")?);
    let image = File::create(&path)?;
    let spool = tempfile::tempfile_in(path.parent().filter(|parent| parent.is_dir()).unwrap_or(".".as_ref()))?;
    let summary = convert(io::stdin().lock(), &image, &spool, &Options::default(), &mut |_| {})?;
    println!("{summary:?}");
    Ok(())
}
