//! The parts of the benchmark.
use super::{
    Options,
    report::{Figure, Isolation, Report},
    subject::{Idle, Subject},
};
use anyhow::{Context, Result, ensure};
use std::{
    fs,
    io::Read,
    process::{Command, Stdio},
    thread,
    time::Instant,
};

/// Bytes that the hash is computed over, in MiB.
const HASHED_MIB: u32 = 256;
/// Single-byte reads and writes: two system calls each.
const COPIES: u32 = 20_000;
/// File that is written and read, in MiB.
const FILE_MIB: u32 = 64;

/// What is measured together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Part {
    /// Start latency
    Start,
    /// Latency of a further process
    Exec,
    /// Memory of idle containers
    Memory,
    /// CPU-bound work, system calls, file I/O
    Work,
    /// What each isolates
    Isolation,
}

impl Part {
    pub(crate) const ALL: [Self; 5] = [Self::Start, Self::Exec, Self::Memory, Self::Work, Self::Isolation];
}

/// Measures one part of all subjects, in turns.
pub(crate) fn part(part: Part, options: &Options, subjects: &[Subject<'_>], report: &mut Report, say: &dyn Fn(&str)) -> Result<()> {
    match part {
        Part::Start => start(options, subjects, report, say),
        Part::Exec => exec(options, subjects, report, say),
        Part::Memory => memory(options, subjects, report, say),
        Part::Work => work(options, subjects, report, say),
        Part::Isolation => isolation(subjects, report, say),
    }
}

/// Milliseconds from the request to the first output byte and to the end.
struct Latency {
    first_byte: f64,
    exit: f64,
}

fn latency(mut command: Command) -> Result<Latency> {
    let begin = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut stdout = child.stdout.take().context("no pipe")?;
    let mut byte = [0];
    let read = stdout.read(&mut byte)?;
    let first_byte = milliseconds(begin);
    drop(stdout);
    let output = child.wait_with_output()?;
    let exit = milliseconds(begin);
    ensure!(output.status.success() && read == 1, "{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(Latency { first_byte, exit })
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

fn start(options: &Options, subjects: &[Subject<'_>], report: &mut Report, say: &dyn Fn(&str)) -> Result<()> {
    for &concurrency in &options.concurrency {
        for round in 0..options.samples {
            for subject in subjects {
                say(&format!("start, {concurrency} at once, round {} of {}: {}", round + 1, options.samples, subject.name));
                let commands = (0..concurrency).map(|n| subject.run(&format!("{round}-{n}"), &["echo", "x"]));
                let commands = commands.collect::<Result<Vec<_>>>()?;
                let ends = thread::scope(|scope| {
                    let running: Vec<_> = commands.into_iter().map(|command| scope.spawn(|| latency(command))).collect();
                    running.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread died")))).collect::<Vec<_>>()
                });
                for end in ends {
                    let end = end.with_context(|| subject.name.clone())?;
                    let at_once = if concurrency == 1 { "1 container".into() } else { format!("{concurrency} at once") };
                    report.add(Figure::ms(format!("start to first output byte, {at_once}")), &subject.name, end.first_byte);
                    report.add(Figure::ms(format!("start to exit, {at_once}")), &subject.name, end.exit);
                }
            }
        }
    }
    Ok(())
}

fn exec(options: &Options, subjects: &[Subject<'_>], report: &mut Report, say: &dyn Fn(&str)) -> Result<()> {
    let warm: Vec<_> = subjects.iter().filter(|subject| !subject.name.contains("--cold")).collect();
    let idle = warm.iter().map(|subject| Ok((*subject, subject.idle("exec")?))).collect::<Result<Vec<_>>>()?;
    for round in 0..options.samples {
        for (subject, idle) in &idle {
            say(&format!("exec, round {} of {}: {}", round + 1, options.samples, subject.name));
            let end = latency(idle.exec(&["echo", "x"])).with_context(|| subject.name.clone())?;
            report.add(Figure::ms("exec to exit"), &subject.name, end.exit);
        }
    }
    Ok(())
}

/// Proportional set sizes, MiB: what all of the processes add to the memory in use, shared pages counted once over all of them.
fn pss_mib(idle: &[Idle<'_>]) -> f64 {
    let mut processes: Vec<u32> = idle.iter().flat_map(Idle::processes).collect();
    processes.sort_unstable();
    processes.dedup();
    let kib = |pid: u32| -> Option<f64> {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
        text.lines().find_map(|line| line.strip_prefix("Pss:"))?.trim().trim_end_matches(" kB").parse().ok()
    };
    processes.into_iter().filter_map(kib).sum::<f64>() / 1024.0
}

fn memory(options: &Options, subjects: &[Subject<'_>], report: &mut Report, say: &dyn Fn(&str)) -> Result<()> {
    let mut counts = options.idle.clone();
    counts.sort_unstable();
    for subject in subjects.iter().filter(|subject| !subject.name.contains("--cold")) {
        let mut idle = Vec::new();
        for &count in &counts {
            say(&format!("memory, {count} idle containers: {}", subject.name));
            while (idle.len() as u32) < count {
                idle.push(subject.idle(&format!("idle-{}", idle.len()))?);
            }
            let each = pss_mib(&idle) / f64::from(count);
            report.add(Figure::mib(format!("PSS per idle container, of {count}")), &subject.name, each);
        }
    }
    Ok(())
}

/// What a script in a container says: a number for each line.
fn figures(subject: &Subject<'_>, name: &str, script: &str) -> Result<Vec<f64>> {
    let mut command = subject.run(name, &["sh", "-c", script])?;
    let output = command.stdin(Stdio::null()).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let numbers: Vec<f64> = text.lines().filter_map(|line| line.trim().parse().ok()).collect();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success() && numbers.len() == 4, "{}: the work failed: {text}{}", subject.name, error.trim());
    Ok(numbers)
}

fn work(options: &Options, subjects: &[Subject<'_>], report: &mut Report, say: &dyn Fn(&str)) -> Result<()> {
    // /proc/uptime counts hundredths of a second; awk subtracts, for the shell has no fractions.
    let script = format!(
        "t() {{ a=$(cut -d' ' -f1 /proc/uptime); eval \"$1\" >/dev/null 2>&1 || exit 1; b=$(cut -d' ' -f1 /proc/uptime); \
         awk \"BEGIN {{ print ($b - $a) * 1000 }}\"; }}\n\
         t 'dd if=/dev/zero bs=1M count={HASHED_MIB} | sha256sum'\n\
         t 'dd if=/dev/zero of=/dev/null bs=1 count={COPIES}'\n\
         t 'dd if=/dev/zero of=/file bs=1M count={FILE_MIB} conv=fsync'\n\
         t 'dd if=/file of=/dev/null bs=1M'; rm /file"
    );
    let names = [
        format!("CPU: SHA-256 of {HASHED_MIB} MiB"),
        format!("system calls: {} of one byte", 2 * COPIES),
        format!("root: write {FILE_MIB} MiB and fsync"),
        format!("root: read {FILE_MIB} MiB back"),
    ];
    for round in 0..options.samples {
        for subject in subjects.iter().filter(|subject| !subject.name.contains("--cold")) {
            say(&format!("work, round {} of {}: {}", round + 1, options.samples, subject.name));
            for (name, figure) in names.iter().zip(figures(subject, &format!("work-{round}"), &script)?) {
                report.add(Figure::ms(name.clone()), &subject.name, figure);
            }
        }
    }
    Ok(())
}

fn isolation(subjects: &[Subject<'_>], report: &mut Report, say: &dyn Fn(&str)) -> Result<()> {
    let script = "uname -r; for n in cgroup ipc mnt net pid user uts; do echo $n=$(readlink /proc/self/ns/$n); done; \
                  grep -E '^(Seccomp|NoNewPrivs|CapBnd):' /proc/self/status; echo devices=$(ls /dev | tr '\\n' ' ')";
    let host_kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
    for subject in subjects.iter().filter(|subject| !subject.name.contains("--cold")) {
        say(&format!("isolation: {}", subject.name));
        let output = subject.run("isolation", &["sh", "-c", script])?.stdin(Stdio::null()).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut lines = text.lines();
        let kernel = lines.next().unwrap_or_default().to_owned();
        let mut found = Isolation { own_kernel: !kernel.is_empty() && kernel != host_kernel, kernel, ..Isolation::default() };
        for line in lines {
            if let Some(devices) = line.strip_prefix("devices=") {
                found.devices = devices.trim().to_owned();
            } else if let Some((status, value)) = line.split_once(':').filter(|(status, _)| !status.contains('=')) {
                found.status.push((status.to_owned(), value.trim().to_owned()));
            } else if let Some((kind, inside)) = line.split_once('=') {
                let outside = fs::read_link(format!("/proc/self/ns/{kind}")).unwrap_or_default();
                // Another kernel numbers its namespaces as it likes: they are others in any case.
                if !inside.is_empty() && (found.own_kernel || inside != outside.to_string_lossy()) {
                    found.own_namespaces.push(kind.to_owned());
                }
            }
        }
        report.isolation(&subject.name, found);
    }
    Ok(())
}
