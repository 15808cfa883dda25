//! `caisson bench`: container against virtual machine on this host, on the same image, in one run.
//!
//! Every figure is measured side by side: the subjects take turns within each round, so that what disturbs the machine disturbs all of
//! them. What is not installed is named as absent. Raw samples go into the JSON, medians with their spread to people.
mod html;
mod measure;
mod report;
mod statistics;
mod subject;

pub(crate) use report::Report;

use anyhow::{Context, Result};
use std::{fs, path::PathBuf};
use subject::Workspace;

/// What to measure, and how often.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  caisson bench\n  caisson bench --samples 10 --concurrency 1,2,4 --json bench.json --html bench.html\n  \
                        caisson bench --only start,exec --subjects caisson,runc")]
pub(crate) struct Options {
    /// Rounds; each measures every subject once
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) samples: u32,
    /// Containers started at once, in turn
    #[arg(long, value_delimiter = ',', default_value = "1,2", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) concurrency: Vec<u32>,
    /// Idle containers whose memory is measured, in turn
    #[arg(long, value_delimiter = ',', default_value = "1,5,10", value_parser = clap::value_parser!(u32).range(1..=200))]
    pub(crate) idle: Vec<u32>,
    /// Parts to measure instead of all of them
    #[arg(long, value_delimiter = ',')]
    pub(crate) only: Vec<measure::Part>,
    /// Subjects to measure instead of all that are installed
    #[arg(long, value_delimiter = ',')]
    pub(crate) subjects: Vec<String>,
    /// Write every raw sample, the machine and the versions to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Write a self-contained report with plots to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
}

/// Measures, prints a table, writes the files that were asked for. `say` is told what is going on.
pub(crate) fn run(options: &Options, root: &std::path::Path, say: &dyn Fn(&str)) -> Result<()> {
    let workspace = Workspace::prepare(root, say)?;
    let (subjects, absent) = subject::all(&workspace, &options.subjects, say)?;
    let mut report = Report::new(&subjects, absent);
    for part in measure::Part::ALL {
        if options.only.is_empty() || options.only.contains(&part) {
            measure::part(part, options, &subjects, &mut report, say)?;
        }
    }
    print!("{}", report.table());
    if let Some(path) = &options.json {
        let json = serde_json::to_string_pretty(&report)?;
        fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &options.html {
        fs::write(path, html::page(&report)).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
