//! A container's cgroup (version 2): limits, figures and events. See the kernel's admin-guide/cgroup-v2.
use crate::{
    device_filter,
    error::{Context, Result, error},
};
use alloc::{
    format,
    string::{String, ToString},
    vec::Vec,
};
use caisson_agent_protocol::{DeviceRule, ErrorKind, Resources, Stats};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{AtFlags, Mode, OFlags, mkdirat, openat, unlinkat},
    io::Errno,
};

/// The controllers that containers get.
const CONTROLLERS: [&str; 5] = ["memory", "cpu", "pids", "io", "cpuset"];
/// The longest content that is read of a cgroup's file; memory.stat has some 1.5 KiB.
const MAX_FILE_BYTES: usize = 8192;
/// The most processes that are read of a cgroup.
const MAX_PROCESSES: usize = 1 << 15;
const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::RDONLY).union(OFlags::CLOEXEC);

/// The hierarchy's root.
pub(crate) struct Root {
    directory: OwnedFd,
    made: u32,
}

impl Root {
    /// Opens a mounted hierarchy and gives its controllers to the groups below.
    ///
    /// # Errors
    /// If it cannot be opened. Controllers that the kernel lacks are left out.
    pub(crate) fn open(path: &str) -> Result<Self> {
        let directory = rustix::fs::open(path, DIRECTORY, Mode::empty()).context(|| format!("opening {path}"))?;
        let all: Vec<String> = CONTROLLERS.iter().map(|name| format!("+{name}")).collect();
        if write(&directory, "cgroup.subtree_control", &all.join(" ")).is_err() {
            for one in &all {
                let _ = write(&directory, "cgroup.subtree_control", one);
            }
        }
        Ok(Self { directory, made: 0 })
    }

    /// Makes a group.
    pub(crate) fn make(&mut self) -> Result<Cgroup> {
        self.made += 1;
        let name = format!("c{}", self.made);
        mkdirat(&self.directory, &*name, Mode::from_raw_mode(0o755)).context(|| String::from("making a cgroup"))?;
        let directory =
            openat(&self.directory, &*name, DIRECTORY, Mode::empty()).context(|| String::from("opening a cgroup"))?;
        Ok(Cgroup { directory, name, enforced: None, loaded: None })
    }

    /// Removes a group whose processes have ended. Their last traces may take a moment to go.
    pub(crate) fn remove(&self, cgroup: &Cgroup) -> Result<()> {
        for _ in 0..200 {
            match unlinkat(&self.directory, &*cgroup.name, AtFlags::REMOVEDIR) {
                Err(Errno::BUSY) => sleep_ms(10),
                result => return result.context(|| String::from("removing a cgroup")),
            }
        }
        Err(error(ErrorKind::System, "removing a cgroup: it still has processes"))
    }
}

/// Sleeps.
pub(crate) fn sleep_ms(milliseconds: u32) {
    let time = rustix::time::Timespec { tv_sec: 0, tv_nsec: i64::from(milliseconds) * 1_000_000 };
    let _ = rustix::thread::nanosleep(&time);
}

/// A container's group.
pub(crate) struct Cgroup {
    directory: OwnedFd,
    name: String,
    /// Device rules' program that is in force.
    enforced: Option<OwnedFd>,
    /// Device rules and their program that is not.
    loaded: Option<(Vec<DeviceRule>, OwnedFd)>,
}

impl Cgroup {
    /// The directory, for clone3(2).
    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Sets limits; not device rules.
    pub(crate) fn set(&mut self, resources: &Resources) -> Result<()> {
        let number = |value: u64| if value == u64::MAX { String::from("max") } else { value.to_string() };
        let numbers = [
            ("memory.max", resources.memory_max_bytes),
            ("memory.high", resources.memory_high_bytes),
            ("memory.low", resources.memory_low_bytes),
            ("cpu.weight", resources.cpu_weight),
            ("pids.max", resources.pids_max),
        ];
        for (file, value) in numbers {
            if let Some(value) = value {
                self.write(file, &number(value))?;
            }
        }
        if let Some(value) = resources.swap_max_bytes {
            // The guest's kernel may have no swap at all, which is as good as any limit.
            match write(&self.directory, "memory.swap.max", &number(value)) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno).context(|| String::from("setting memory.swap.max")),
            }
        }
        if let Some((quota, period)) = resources.cpu_max_us {
            self.write("cpu.max", &format!("{} {period}", number(quota)))?;
        }
        if let Some(cpus) = &resources.cpuset_cpus {
            self.write("cpuset.cpus", cpus)?;
        }
        for (file, value) in &resources.unified {
            if file.contains('/') || file.starts_with('.') {
                return Err(error(ErrorKind::Invalid, format!("{file:?} is no cgroup file's name")));
            }
            self.write(file, value)?;
        }
        Ok(())
    }

    /// Loads the program that enforces device rules, if there are any, without enforcing them yet.
    pub(crate) fn load_device_rules(&mut self, rules: &[DeviceRule]) -> Result<()> {
        if !rules.is_empty() && self.loaded.as_ref().is_none_or(|(loaded, _)| loaded != rules) {
            self.loaded = Some((rules.to_vec(), device_filter::load(rules)?));
        }
        Ok(())
    }

    /// Enforces device rules, if there are any. They hold for the set-up of a container too, which opens disks: so they come after it.
    pub(crate) fn enforce_device_rules(&mut self, rules: &[DeviceRule]) -> Result<()> {
        if rules.is_empty() {
            return Ok(());
        }
        self.load_device_rules(rules)?;
        if let Some((_, filter)) = self.loaded.take() {
            device_filter::attach(self.directory(), filter.as_fd(), self.enforced.as_ref().map(AsFd::as_fd))?;
            self.enforced = Some(filter);
        }
        Ok(())
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        write(&self.directory, file, value).context(|| format!("setting {file} to {value:?}"))
    }

    /// Reads figures. What a file or controller does not tell is zero.
    pub(crate) fn stats(&self) -> Stats {
        let file = |name| read(&self.directory, name).unwrap_or_default();
        let number = |name| parse_number(&file(name)).unwrap_or(0);
        let (cpu, memory, events, io) = (file("cpu.stat"), file("memory.stat"), file("memory.events"), file("io.stat"));
        Stats {
            cpu_usage_us: field(&cpu, "usage_usec"),
            cpu_user_us: field(&cpu, "user_usec"),
            cpu_system_us: field(&cpu, "system_usec"),
            cpu_throttling: (field(&cpu, "nr_periods"), field(&cpu, "nr_throttled"), field(&cpu, "throttled_usec")),
            memory_current_bytes: number("memory.current"),
            memory_max_bytes: number("memory.max"),
            memory_peak_bytes: number("memory.peak"),
            memory_anon_bytes: field(&memory, "anon"),
            memory_file_bytes: field(&memory, "file"),
            memory_inactive_file_bytes: field(&memory, "inactive_file"),
            oom_kills: field(&events, "oom_kill"),
            pids_current: number("pids.current"),
            pids_max: number("pids.max"),
            io_read_bytes: sum(&io, "rbytes="),
            io_written_bytes: sum(&io, "wbytes="),
        }
    }

    /// A descriptor that polls as exceptional when the number that [`oom_kills`] reads from it may have changed. None without the memory controller.
    pub(crate) fn watch_oom(&self) -> Option<OwnedFd> {
        openat(&self.directory, "memory.events", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()
    }

    /// Freezes or thaws all processes; returns when they are.
    pub(crate) fn freeze(&self, frozen: bool) -> Result<()> {
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })?;
        for _ in 0..1000 {
            let events = read(&self.directory, "cgroup.events").context(|| String::from("reading cgroup.events"))?;
            if (field(&events, "frozen") == 1) == frozen {
                return Ok(());
            }
            sleep_ms(10);
        }
        let _ = self.write("cgroup.freeze", "0");
        Err(error(ErrorKind::System, "the container's processes did not freeze within 10 s"))
    }

    /// Kills all processes.
    pub(crate) fn kill(&self) -> Result<()> {
        self.write("cgroup.kill", "1")
    }

    /// The PIDs of all processes, those of groups below included, as the agent sees them.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let mut processes = Vec::new();
        collect_processes(&self.directory, 0, &mut processes);
        processes
    }
}

/// How deep groups within a container are looked into.
const MAX_DEPTH: u8 = 16;

fn collect_processes(directory: &OwnedFd, depth: u8, processes: &mut Vec<u32>) {
    if let Ok(file) = openat(directory, "cgroup.procs", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
        let mut content = Vec::new();
        let mut buffer = [0; 1024];
        while let Ok(count) = rustix::io::read(&file, &mut buffer) {
            if count == 0 || content.len() > 8 * MAX_PROCESSES {
                break;
            }
            content.extend_from_slice(&buffer[..count]);
        }
        let text = String::from_utf8_lossy(&content);
        processes.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()).filter(|pid| *pid != 0));
    }
    if depth == MAX_DEPTH || processes.len() > MAX_PROCESSES {
        return;
    }
    let Ok(entries) = rustix::fs::Dir::read_from(directory) else { return };
    for entry in entries.flatten() {
        if entry.file_type() == rustix::fs::FileType::Directory
            && !entry.file_name().to_bytes().starts_with(b".")
            && let Ok(below) = openat(directory, entry.file_name(), DIRECTORY, Mode::empty())
        {
            collect_processes(&below, depth + 1, processes);
        }
    }
}

/// How many processes of the group the kernel has killed for want of memory.
pub(crate) fn oom_kills(events: &OwnedFd) -> u64 {
    let mut buffer = [0; 512];
    match rustix::io::pread(events, &mut buffer, 0) {
        Ok(count) => field(&String::from_utf8_lossy(&buffer[..count]), "oom_kill"),
        Err(_) => 0,
    }
}

fn write(directory: &OwnedFd, file: &str, value: &str) -> rustix::io::Result<()> {
    let file = openat(directory, file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    // cgroup files take one value in one write.
    rustix::io::write(file, value.as_bytes()).map(drop)
}

fn read(directory: &OwnedFd, file: &str) -> rustix::io::Result<String> {
    let file = openat(directory, file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut content = alloc::vec![0; MAX_FILE_BYTES];
    let count = rustix::io::read(file, &mut *content)?;
    Ok(String::from_utf8_lossy(&content[..count]).into_owned())
}

/// The value of a line "name value".
fn field(text: &str, name: &str) -> u64 {
    let value = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok();
    text.lines().find_map(value).unwrap_or(0)
}

/// The sum of all words that begin with `prefix`.
fn sum(text: &str, prefix: &str) -> u64 {
    let values = text.split_whitespace().filter_map(|word| word.strip_prefix(prefix)?.parse::<u64>().ok());
    values.fold(0, u64::saturating_add)
}

fn parse_number(text: &str) -> Option<u64> {
    match text.trim() {
        "max" => Some(u64::MAX),
        number => number.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_by_name() {
        let text = "usage_usec 12\nuser_usec 5\nusage_usec_x 7\n";
        assert_eq!(field(text, "usage_usec"), 12);
        assert_eq!(field(text, "user_usec"), 5);
        assert_eq!(field(text, "usec"), 0);
        assert_eq!(sum("254:0 rbytes=4096 wbytes=1 rios=1\n254:16 rbytes=1 wbytes=2\n", "rbytes="), 4097);
        assert_eq!(parse_number("max\n"), Some(u64::MAX));
        assert_eq!(parse_number("17\n"), Some(17));
    }
}
