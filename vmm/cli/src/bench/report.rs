//! What was measured, as data and as a table.
use super::{statistics, statistics::Summary, subject::Subject};
use serde::Serialize;
use std::{fmt::Write, fs};

/// What a sample is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) unit: &'static str,
}

impl Figure {
    pub(crate) fn ms(name: impl Into<String>) -> Self {
        Self { name: name.into(), unit: "ms" }
    }

    pub(crate) fn mib(name: impl Into<String>) -> Self {
        Self { name: name.into(), unit: "MiB" }
    }
}

/// The samples of one figure of one subject.
#[derive(Debug, Serialize)]
pub(crate) struct Samples {
    pub(crate) subject: String,
    pub(crate) samples: Vec<f64>,
    pub(crate) summary: Option<Summary>,
}

/// One figure of all subjects.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    #[serde(flatten)]
    pub(crate) figure: Figure,
    pub(crate) subjects: Vec<Samples>,
}

/// What a program in a container of a subject finds.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Isolation {
    pub(crate) kernel: String,
    pub(crate) own_kernel: bool,
    pub(crate) own_namespaces: Vec<String>,
    pub(crate) status: Vec<(String, String)>,
    pub(crate) devices: String,
}

/// The machine that it was measured on.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) cpu: String,
    pub(crate) cpus: usize,
    pub(crate) memory_mib: u64,
    pub(crate) kernel: String,
    pub(crate) kvm: String,
}

/// All of it.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) versions: Vec<(String, String)>,
    pub(crate) absent: Vec<String>,
    pub(crate) remarks: Vec<String>,
    pub(crate) figures: Vec<Row>,
    pub(crate) isolation: Vec<(String, Isolation)>,
}

const ON_SOFTWARE_KVM: &str = "This host's KVM has no hardware virtualisation under it: it interprets what guest kernels execute, at some \
two million instructions a second, while guest programs run at full speed. Figures of work that enters the guest's kernel (starts, exec, system calls, \
file I/O) are tens to hundreds of times what the same machine would take on hardware; compare them with each other, not with other hosts'.";

impl Report {
    pub(crate) fn new(subjects: &[Subject<'_>], absent: Vec<String>) -> Self {
        let kind = caisson_runtime::kvm_kind_in_words();
        let remarks = if kind.contains("software") { vec![ON_SOFTWARE_KVM.to_owned()] } else { Vec::new() };
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
            line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal").trim_end_matches(" kB").parse().unwrap_or(0) / 1024;
        let machine = Machine {
            cpu: field(&read("/proc/cpuinfo"), "model name"),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: memory,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            kvm: kind,
        };
        let versions = subjects.iter().map(|subject| (subject.name.clone(), subject.version.clone())).collect();
        Self { machine, versions, absent, remarks, figures: Vec::new(), isolation: Vec::new() }
    }

    /// Adds one sample.
    pub(crate) fn add(&mut self, figure: Figure, subject: &str, sample: f64) {
        let row = match self.figures.iter().position(|row| row.figure == figure) {
            Some(row) => row,
            None => {
                self.figures.push(Row { figure, subjects: Vec::new() });
                self.figures.len() - 1
            }
        };
        let subjects = &mut self.figures[row].subjects;
        let of = match subjects.iter().position(|of| of.subject == subject) {
            Some(of) => of,
            None => {
                subjects.push(Samples { subject: subject.to_owned(), samples: Vec::new(), summary: None });
                subjects.len() - 1
            }
        };
        subjects[of].samples.push(sample);
        subjects[of].summary = statistics::summary(&subjects[of].samples);
    }

    pub(crate) fn isolation(&mut self, subject: &str, found: Isolation) {
        self.isolation.push((subject.to_owned(), found));
    }

    /// For the terminal: medians, the quartiles' distance, and the ratio to caisson's.
    pub(crate) fn table(&self) -> String {
        let mut out = String::new();
        let machine = &self.machine;
        line(&mut out, &format!("{} CPUs ({}), {} MiB, Linux {}, KVM: {}", machine.cpus, machine.cpu, machine.memory_mib, machine.kernel, machine.kvm));
        for remark in &self.remarks {
            line(&mut out, remark);
        }
        for absent in &self.absent {
            line(&mut out, &format!("absent: {absent}"));
        }
        for row in &self.figures {
            line(&mut out, &format!("\n{} ({}; median, quartiles, ratio to caisson)", row.figure.name, row.figure.unit));
            let own = row.subjects.iter().find(|of| of.subject == "caisson").and_then(|of| of.summary);
            for of in &row.subjects {
                let Some(summary) = of.summary else { continue };
                let ratio = own.filter(|own| own.median > 0.0).map_or_else(String::new, |own| format!("{:>8.3}x", summary.median / own.median));
                let quartiles = format!("{:.1}..{:.1}", summary.lower_quartile, summary.upper_quartile);
                line(&mut out, &format!("  {:<16}{:>10.1}  {quartiles:<20}{ratio}", of.subject, summary.median));
            }
        }
        if !self.isolation.is_empty() {
            line(&mut out, "\nisolation, as a program inside finds it");
        }
        for (subject, found) in &self.isolation {
            let kernel = if found.own_kernel { "a kernel of its own" } else { "the host's kernel" };
            line(&mut out, &format!("  {subject:<16}{kernel} ({}); own namespaces: {}", found.kernel, found.own_namespaces.join(" ")));
            let status: Vec<String> = found.status.iter().map(|(name, value)| format!("{name} {value}")).collect();
            line(&mut out, &format!("  {:<16}{}; devices: {}", "", status.join(", "), found.devices));
        }
        out
    }
}

fn line(out: &mut String, text: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "{text}");
}
