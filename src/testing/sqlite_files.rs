//! The SQLite files of tests. Each process has a folder for its files, which is locked until the process ends.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use parking_lot::Mutex;

use super::leftovers::KEPT_CONTENTS;
use super::lock_file::{LockFile, holder_of, open};
use super::shared_folder::{make_private_inside, shared_folder};
use super::test_setup::keep_is_requested;

/// A path at which no file exists.
pub(super) fn new_path() -> Result<PathBuf, String> {
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    Ok(process_folder()?.join(format!("{}.sqlite", NEXT.fetch_add(1, Ordering::Relaxed))))
}

/// The path of the template with the hash `contents_hash`.
pub(super) fn template(contents_hash: u64, wal: bool) -> Result<PathBuf, String> {
    let log = if wal { "-wal" } else { "" };
    Ok(sqlite_folder()?.join(format!("template-{contents_hash:016x}{log}.sqlite")))
}

/// Copies a template and records its use. Returns `false` if the template does not exist.
pub(super) fn copy(template: &Path, to: &Path) -> Result<bool, String> {
    let failed = |error: io::Error| {
        // An incomplete copy is useless.
        let _ = fs::remove_file(to);
        format!("{} cannot be copied to {}: {error}", template.display(), to.display())
    };
    let mut from = match open(template, OpenOptions::new().read(true).write(true)) {
        Ok(from) => from,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(failed(error)),
    };
    // A failure is harmless: the time only decides which template is removed first.
    let _ = from.set_modified(SystemTime::now());
    let mut copy = File::create_new(to).map_err(failed)?;
    io::copy(&mut from, &mut copy).map_err(failed)?;
    Ok(true)
}

/// Renames a finished template to its final name, and removes the least recently used templates beyond
/// [`KEPT_CONTENTS`].
pub(super) fn keep(finished: &Path, template: &Path) -> Result<(), String> {
    fs::rename(finished, template).map_err(|error| format!("{} cannot be made: {error}", template.display()))?;
    let Ok(mut kept) = templates() else { return Ok(()) };
    kept.retain(|(_, path)| path != template);
    kept.sort();
    let surplus = (kept.len() + 1).saturating_sub(KEPT_CONTENTS);
    for (_, path) in kept.iter().take(surplus) {
        // Another process may remove the file at the same time.
        let _ = fs::remove_file(path);
    }
    Ok(())
}

/// Removes all templates. Returns the number of removed templates.
pub(super) fn remove_templates() -> Result<usize, String> {
    let failed = |error: io::Error| format!("the templates cannot be removed: {error}");
    let mut removed = 0;
    for (_, path) in templates().map_err(failed)? {
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            outcome => {
                outcome.map_err(failed)?;
                removed += 1;
            }
        }
    }
    Ok(removed)
}

/// Removes a database file with its journal, write-ahead log and shared-memory file.
pub(super) fn remove(path: &Path) -> Result<(), String> {
    crate::admin::remove_sqlite_files(path).map_err(|error| format!("{} cannot be removed: {error}", path.display()))
}

/// The folder of the SQLite files of all processes of this user.
fn sqlite_folder() -> Result<PathBuf, String> {
    let folder = shared_folder()?;
    make_private_inside(folder, "sqlite")
        .map_err(|error| format!("{} cannot be made: {error}", folder.join("sqlite").display()))
}

/// All templates, each with the time of its last use.
fn templates() -> io::Result<Vec<(SystemTime, PathBuf)>> {
    let mut templates = Vec::new();
    for entry in fs::read_dir(sqlite_folder().map_err(io::Error::other)?)? {
        let entry = entry?;
        let is_template = entry.file_name().to_str().is_some_and(is_template);
        if is_template && let Ok(found) = entry.metadata() {
            templates.push((found.modified()?, entry.path()));
        }
    }
    Ok(templates)
}

/// Whether a file has the name of a template.
fn is_template(name: &str) -> bool {
    let Some(name) = name.strip_prefix("template-").and_then(|name| name.strip_suffix(".sqlite")) else { return false };
    let contents_hash = name.strip_suffix("-wal").unwrap_or(name);
    contents_hash.len() == 16 && contents_hash.bytes().all(|digit| digit.is_ascii_hexdigit())
}

/// The folder of this process. It is created at the first use, and locked until the process ends, also by a kill.
fn process_folder() -> Result<PathBuf, String> {
    static PROCESS_FOLDER: Mutex<Option<(PathBuf, LockFile)>> = Mutex::new(None);
    let mut folder = PROCESS_FOLDER.lock();
    if let Some((path, _)) = &*folder {
        return Ok(path.clone());
    }
    let all = sqlite_folder()?;
    let (path, lock) = make_process_folder(&all)
        .map_err(|error| format!("a folder for SQLite files cannot be made in {}: {error}", all.display()))?;
    *folder = Some((path.clone(), lock));
    Ok(path)
}

/// Creates the folder of this process, and removes the folders of ended processes. One lock covers both steps:
/// otherwise another process could remove a new folder before its lock is held.
fn make_process_folder(all: &Path) -> io::Result<(PathBuf, LockFile)> {
    let folders_lock = open(&all.join("turn"), OpenOptions::new().read(true).write(true).create(true).truncate(false))?;
    folders_lock.lock()?;
    for entry in fs::read_dir(all)?.filter(|_| !keep_is_requested()) {
        let path = entry?.path();
        // A process that was killed while it created or removed its folder may have left no lock in it. Both steps need
        // the lock that this process holds now.
        if is_process_folder(&path) && holder_of(&path.join("lock")).is_none() {
            fs::remove_dir_all(&path)?;
        }
    }
    let mut paths = (0..).map(|number: u64| all.join(format!("{}-{number}", std::process::id())));
    let path = paths.find(|path| fs::symlink_metadata(path).is_err()).unwrap_or_default();
    fs::create_dir(&path)?;
    let lock = LockFile::open(&path.join("lock"))?;
    lock.try_lock()?;
    Ok((path, lock))
}

/// Whether a path is a folder with the name of a process's folder, and no link.
fn is_process_folder(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let is_number = |text: &str| text.parse::<u32>().is_ok();
    fs::symlink_metadata(path).is_ok_and(|found| found.is_dir())
        && name.split_once('-').is_some_and(|(process, number)| is_number(process) && is_number(number))
}
