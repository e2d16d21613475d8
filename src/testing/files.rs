//! SQLite files of tests: in a folder of this process's, locked as long as it lives.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::folder::folder;
use super::setup::keeps;

/// The files of one database object.
#[derive(Default)]
pub(super) struct Files {
    /// Templates are made one after the other.
    pub(super) making: Mutex<()>,
}

/// This process's folder.
struct Own {
    path: PathBuf,
    /// Held until the process ends, in whatever way.
    _lock: File,
}

impl Files {
    /// A path that nothing has yet.
    pub(super) fn new_path(&self) -> Result<PathBuf, String> {
        static NEXT: AtomicUsize = AtomicUsize::new(1);
        Ok(own()?.path.join(format!("{}.sqlite", NEXT.fetch_add(1, Ordering::Relaxed))))
    }

    /// Where the template of a content is, or will be.
    pub(super) fn template(&self, content: u64, wal: bool) -> Result<PathBuf, String> {
        let log = if wal { "-wal" } else { "" };
        Ok(all()?.join(format!("template-{content:016x}{log}.sqlite")))
    }

    /// Removes all templates; how many there were.
    pub(super) fn remove_templates(&self) -> Result<usize, String> {
        let failed = |error: io::Error| format!("the templates cannot be removed: {error}");
        let mut removed = 0;
        for entry in fs::read_dir(all()?).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_some_and(|extension| extension == "sqlite") {
                fs::remove_file(&path).map_err(failed)?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// Removes a database with its write-ahead log.
    pub(super) fn remove(&self, path: &Path) -> Result<(), String> {
        for suffix in ["", "-wal", "-shm", "-journal"] {
            let mut name = path.as_os_str().to_owned();
            name.push(suffix);
            match fs::remove_file(&name) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(format!("{} cannot be removed: {error}", path.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The folder of all processes.
fn all() -> Result<PathBuf, String> {
    let path = folder()?.join("sqlite");
    fs::create_dir_all(&path).map_err(|error| format!("{} cannot be made: {error}", path.display()))?;
    Ok(path)
}

fn own() -> Result<&'static Own, String> {
    static OWN: OnceLock<Own> = OnceLock::new();
    static MAKING: Mutex<()> = Mutex::new(());
    if let Some(own) = OWN.get() {
        return Ok(own);
    }
    let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(own) = OWN.get() {
        return Ok(own);
    }
    let all = all()?;
    let made = make(&all)
        .map_err(|error| format!("a folder for SQLite files cannot be made in {}: {error}", all.display()))?;
    Ok(OWN.get_or_init(|| made))
}

/// Makes this process's folder, and removes those whose processes have ended. Both under one lock: a folder that is not locked yet
/// would be taken for one of the dead.
fn make(all: &Path) -> io::Result<Own> {
    let turn = File::create(all.join("turn"))?;
    turn.lock()?;
    for entry in fs::read_dir(all)?.filter(|_| !keeps()) {
        let path = entry?.path();
        let is_dead = match File::open(path.join("lock")) {
            Ok(lock) => lock.try_lock().is_ok(),
            // Somebody who was removing it, or making it, was killed: both have had the turn.
            Err(error) => error.kind() == io::ErrorKind::NotFound && is_of_a_process(&path),
        };
        if is_dead {
            fs::remove_dir_all(&path)?;
        }
    }
    for number in 0.. {
        let path = all.join(format!("{}-{number}", std::process::id()));
        match fs::create_dir(&path) {
            Ok(()) => {
                let lock = File::create(path.join("lock"))?;
                lock.lock()?;
                return Ok(Own { path, _lock: lock });
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    unreachable!("there are more numbers than folders")
}

/// Whether a folder has the name of one of these.
fn is_of_a_process(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    path.is_dir()
        && name
            .split_once('-')
            .is_some_and(|(process, number)| process.parse::<u32>().is_ok() && number.parse::<u32>().is_ok())
}
