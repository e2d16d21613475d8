use std::env;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use super::text;

/// The program of that name in one of the folders, else in `PATH`.
pub fn find(name: &str, folders: &[PathBuf]) -> Result<PathBuf, String> {
    let path = env::var_os("PATH").unwrap_or_default();
    let searched: Vec<PathBuf> = folders.iter().cloned().chain(env::split_paths(&path)).collect();
    let found = searched.iter().map(|folder| folder.join(name)).find(|program| program.is_file());
    found.ok_or_else(|| format!("there is no program `{name}` in {searched:?}"))
}

/// `parent/*/bin` with the highest version number first.
pub fn versioned_folders(parent: &Path) -> Vec<PathBuf> {
    let versions = fs::read_dir(parent).into_iter().flatten().flatten();
    let mut folders: Vec<(u32, PathBuf)> = versions
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin"))))
        .collect();
    folders.sort_by_key(|(version, _)| std::cmp::Reverse(*version));
    folders.into_iter().map(|(_, folder)| folder).collect()
}

/// A listener on a loopback port outside the range from which the kernel serves outgoing connections, so that the
/// port is still free when it is wanted a second time.
pub fn free_listener() -> TcpListener {
    let start = text::random() % 10_000;
    let mut ports = (0..10_000).map(|step| 20_000 + ((start + step) % 10_000) as u16);
    ports.find_map(|port| TcpListener::bind(("127.0.0.1", port)).ok()).expect("a free loopback port")
}

/// The port of such a listener.
pub fn free_port() -> u16 {
    free_listener().local_addr().expect("a bound listener has an address").port()
}
