//! The report as one self-contained page: no script, no font, no image from elsewhere.
use super::report::{Report, Row};
use std::fmt::Write;

const STYLE: &str = "body{font:15px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1d2733}\
h1{font-size:1.5rem}h2{font-size:1.1rem;margin:2rem 0 .3rem}table{border-collapse:collapse}td,th{padding:.15rem .8rem .15rem 0;text-align:left}\
td.n{text-align:right;font-variant-numeric:tabular-nums}p.remark{background:#fff5d9;padding:.6rem 1rem;border-left:4px solid #e0a800}\
svg{display:block;margin:.3rem 0 .6rem}text{font:12px sans-serif;fill:#1d2733}";
const COLOURS: [&str; 7] = ["#0b6e99", "#5fa8c7", "#c8553d", "#e0a800", "#6a4c93", "#588157", "#8d99ae"];
const WIDTH: f64 = 860.0;
const LABEL: f64 = 140.0;
const BAR: f64 = 22.0;

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The whole page.
pub(crate) fn page(report: &Report) -> String {
    let mut out = String::new();
    let machine = &report.machine;
    // Writing to a string cannot fail.
    let _ = write!(
        out,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>caisson bench</title><style>{STYLE}</style>\
         <h1>Container against virtual machine, on one host</h1><p>{} CPUs ({}), {} MiB, Linux {}, KVM: {}</p>",
        machine.cpus,
        escape(&machine.cpu),
        machine.memory_mib,
        escape(&machine.kernel),
        escape(&machine.kvm)
    );
    for remark in &report.remarks {
        let _ = write!(out, "<p class=\"remark\">{}</p>", escape(remark));
    }
    out.push_str("<table>");
    for (name, version) in &report.versions {
        let _ = write!(out, "<tr><td>{}</td><td>{}</td></tr>", escape(name), escape(version));
    }
    for absent in &report.absent {
        let _ = write!(out, "<tr><td colspan=\"2\">absent: {}</td></tr>", escape(absent));
    }
    out.push_str("</table>");
    for row in &report.figures {
        figure(&mut out, row);
    }
    if !report.isolation.is_empty() {
        out.push_str("<h2>Isolation, as a program inside finds it</h2><table><tr><th></th><th>kernel</th><th>own namespaces</th><th>status</th><th>devices</th></tr>");
    }
    for (subject, found) in &report.isolation {
        let status: Vec<String> = found.status.iter().map(|(name, value)| format!("{name} {value}")).collect();
        let kernel = if found.own_kernel { "its own" } else { "the host's" };
        let _ = write!(
            out,
            "<tr><td>{}</td><td>{kernel}: {}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(subject),
            escape(&found.kernel),
            escape(&found.own_namespaces.join(" ")),
            escape(&status.join(", ")),
            escape(&found.devices)
        );
    }
    if !report.isolation.is_empty() {
        out.push_str("</table>");
    }
    out.push_str("</html>\n");
    out
}

/// A bar for each subject's median, a line for its quartiles, a dot for each sample.
fn figure(out: &mut String, row: &Row) {
    let most = row.subjects.iter().flat_map(|of| of.samples.iter().copied()).fold(f64::MIN_POSITIVE, f64::max);
    let height = BAR * row.subjects.len() as f64;
    let scale = |value: f64| LABEL + value / most * (WIDTH - LABEL - 90.0);
    let _ = write!(
        out,
        "<h2>{} ({})</h2><svg viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\">",
        escape(&row.figure.name),
        row.figure.unit
    );
    for (index, of) in row.subjects.iter().enumerate() {
        let Some(summary) = of.summary else { continue };
        let top = BAR * index as f64;
        let middle = top + BAR / 2.0;
        let colour = COLOURS[index % COLOURS.len()];
        let _ = write!(
            out,
            "<text x=\"0\" y=\"{:.1}\">{}</text><rect x=\"{LABEL}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{colour}\" opacity=\".55\"/>",
            middle + 4.0,
            escape(&of.subject),
            top + 3.0,
            scale(summary.median) - LABEL,
            BAR - 6.0
        );
        let _ = write!(
            out,
            "<line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\" stroke=\"#1d2733\"/>",
            scale(summary.lower_quartile),
            scale(summary.upper_quartile)
        );
        for sample in &of.samples {
            let _ = write!(out, "<circle cx=\"{:.1}\" cy=\"{middle:.1}\" r=\"2\" fill=\"#1d2733\"/>", scale(*sample));
        }
        let _ = write!(out, "<text x=\"{:.1}\" y=\"{:.1}\">{:.1}</text>", scale(summary.maximum) + 8.0, middle + 4.0, summary.median);
    }
    out.push_str("</svg>");
}
