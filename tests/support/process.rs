use std::fs;
use std::process::Command;

/// Threads of this process.
pub fn threads() -> usize {
    entries("/proc/self/task")
}

/// Open file descriptors of this process.
pub fn fds() -> usize {
    // Reading the folder opens one more.
    entries("/proc/self/fd") - 1
}

/// Whether the process runs; a zombie does not.
pub fn alive(pid: u32) -> bool {
    stat(pid).is_some_and(|(state, _)| state != "Z" && state != "X")
}

/// Sends a signal by its name without `SIG`; false when there is no such process (any more).
pub fn signal(name: &str, pids: &[u32]) -> bool {
    // The shell's own `kill`: a small system has no program of that name.
    let pids = pids.iter().map(u32::to_string);
    let status =
        Command::new("sh").args(["-c", r#"kill "$@" 2>/dev/null"#, "sh", &format!("-{name}")]).args(pids).status();
    status.expect("sh runs").success()
}

/// The processes whose parent is `pid`.
pub fn children(pid: u32) -> Vec<u32> {
    let all = fs::read_dir("/proc").expect("/proc is mounted");
    let pids = all.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|&child| stat(child).is_some_and(|(_, parent)| parent == pid)).collect()
}

fn entries(folder: &str) -> usize {
    fs::read_dir(folder).expect("/proc is mounted").count()
}

/// State and parent.
fn stat(pid: u32) -> Option<(String, u32)> {
    let line = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may itself contain blanks and parentheses.
    let mut fields = line[line.rfind(')')? + 1..].split_whitespace();
    Some((fields.next()?.to_owned(), fields.next()?.parse().ok()?))
}
