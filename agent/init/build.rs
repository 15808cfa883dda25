//! How the freestanding program is linked: static, at a fixed address, without the C start files and libraries.
fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_FREESTANDING").is_none() {
        return;
    }
    for argument in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        // After rustc's own -pie, which it undoes: nothing then needs to be relocated at start.
        "-no-pie",
        // The guest pays for every page: no unused tables, no padding between segments, no page to be made read-only later.
        "-Wl,--build-id=none,--no-eh-frame-hdr,-z,norelro,-z,noseparate-code,--gc-sections",
    ] {
        println!("cargo::rustc-link-arg-bin=caisson-agent={argument}");
    }
}
