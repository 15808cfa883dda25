//! What this kernel is told on its command line.

/// What any guest's kernel is told.
///
/// - `quiet loglevel=1`: only what comes before a crash is printed; each line costs exits on hardware and milliseconds without.
/// - `reboot=k panic=-1`: a reboot or a panic resets the machine by the keyboard controller at once, which ends it.
/// - `tsc=reliable no_timer_check`: KVM's clocks need no watchdog, and there is no PIT to test the timer interrupt with.
/// - `rcupdate.rcu_expedited=1`: mounts, namespaces and cgroups wait for grace periods; with few processors forcing one is
///   cheaper than waiting for ticks.
/// - `cgroup_no_v1=all`: the agent uses cgroup v2 only.
/// - `random.trust_cpu=on`: the pool is ready at once; virtio-rng adds the host's entropy to it.
const COMMON: &str = "quiet loglevel=1 reboot=k panic=-1 tsc=reliable no_timer_check rcupdate.rcu_expedited=1 \
                      cgroup_no_v1=all random.trust_cpu=on";

/// For hardware KVM: the kernel chooses its mitigations by the processor that it sees.
pub const HARDWARE: &str = "";

/// For software KVM, where the host runs all of the guest at CPL 3 and confines it there.
///
/// - `caisson.software_kvm`: take the page fault that SYSCALL ends in for the system call (patches/0001).
/// - `mitigations=off`: the processor never runs this kernel's instructions; the host's own mitigations guard the guests from each other.
/// - `rodata=off`: remapping the kernel read-only, page by page, costs a fifth of a second or more.
/// - `clearcpuid=...`: some software KVMs show the kernel the host's CPUID whatever the monitor masks. These features cost
///   instructions that the monitor must supply (`clac` at each interrupt, `cmpxchg16b` in the allocator), and guard nothing there;
///   erms, fsrm, fzrm, fsrs and fsrc (394 to 396, which have no names) make the kernel clear and copy pages by bytes, each of which is
///   emulated: `rep stosb` over a page takes seven times as long as `rep stosq`.
/// - `noreplace-smp`: with one processor the kernel would patch out a thousand lock prefixes, mapping a page for each.
/// - `rcupdate.rcu_cpu_stall_suppress=1`: a slow processor is not a stalled one.
pub const SOFTWARE: &str = "caisson.software_kvm mitigations=off rodata=off \
                            noreplace-smp \
                            clearcpuid=smap,smep,umip,xsavec,fsgsbase,cx16,erms,fsrm,394,395,396 rcupdate.rcu_cpu_stall_suppress=1";

/// The part of the command line that is the kernel's own affair; the monitor adds the devices, the runtime the agent's.
/// `kvm_kind_is_software` says whether the host's KVM works without hardware virtualisation.
pub fn command_line(kvm_kind_is_software: bool) -> String {
    let kind = if kvm_kind_is_software { SOFTWARE } else { HARDWARE };
    [COMMON, kind].iter().filter(|part| !part.is_empty()).copied().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_software_flag_is_never_given_to_hardware() {
        assert!(!command_line(false).contains("caisson.software_kvm"));
        assert!(!command_line(false).contains("mitigations=off"));
        assert!(command_line(true).contains("caisson.software_kvm"));
    }

    #[test]
    fn the_parts_are_words_apart_by_one_space() {
        for software in [false, true] {
            let line = command_line(software);
            assert!(!line.contains("  ") && line.trim() == line && !line.contains('\n'), "{line:?}");
        }
    }
}
