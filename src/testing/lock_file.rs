//! A file whose lock says that somebody is there, and whose text says who.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::Path;
use std::time::{Duration, Instant};
use std::{fmt, process};

use super::folder::make_inside;

/// The longest label that is kept, in characters.
const LABEL: usize = 120;

/// The longest text that is read, in bytes.
const LONGEST: u64 = 4096;

/// One opening of the file. Locks belong to openings: two of them exclude each other in one process too, and the system takes the
/// lock away with the process, however that ends.
#[derive(Debug)]
pub(crate) struct LockFile(File);

/// Who signed a file. It is for messages only: a lock is held a moment before it is signed, and is not signed off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Who {
    /// `None`: not to be read.
    pub(crate) process: Option<u32>,
    pub(crate) label: String,
}

impl LockFile {
    /// Opens it; makes it, and its folder, where there is none.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let open =
            || self::open(path, OpenOptions::new().read(true).write(true).create(true).truncate(false)).map(Self);
        match (open(), path.parent()) {
            (Err(error), Some(parent)) if error.kind() == io::ErrorKind::NotFound => {
                make_inside(parent)?;
                open()
            }
            (opened, _) => opened,
        }
    }

    /// Whether the lock is ours now.
    pub(crate) fn try_lock(&self) -> io::Result<bool> {
        unless_taken(self.0.try_lock())
    }

    /// Whether a lock beside other shared ones is ours now.
    pub(crate) fn try_lock_shared(&self) -> io::Result<bool> {
        unless_taken(self.0.try_lock_shared())
    }

    /// Waits for the lock until `deadline`; whether it is ours then.
    pub(crate) fn lock_until(&self, deadline: Instant) -> io::Result<bool> {
        while !self.try_lock()? {
            if Instant::now() >= deadline {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(true)
    }

    /// An opening that a child process has inherited keeps its lock when it is closed here; this ends the lock all the same.
    pub(crate) fn unlock(&self) -> io::Result<()> {
        self.0.unlock()
    }

    /// Writes who this is; for the holder of the lock.
    pub(crate) fn sign(&self, label: &str) -> io::Result<()> {
        let label: String = label.chars().take(LABEL).map(|c| if c.is_control() { ' ' } else { c }).collect();
        let mut file = &self.0;
        file.set_len(0)?;
        file.rewind()?;
        file.write_all(format!("{} {label}\n", process::id()).as_bytes())
    }
}

/// Who holds the lock of the file, if anybody does. Where a lock is free it is taken for a moment.
pub(crate) fn holder(path: &Path) -> Option<Who> {
    let file = open(path, OpenOptions::new().read(true)).ok()?;
    if file.try_lock_shared().is_ok() {
        // The file is closed next, which ends the lock where this fails.
        let _ = file.unlock();
        return None;
    }
    let text = text(&file).unwrap_or_default();
    let (process, label) = text.trim_end().split_once(' ').unwrap_or_default();
    Some(Who { process: process.parse().ok(), label: label.to_owned() })
}

/// Opens a file in a folder that has been checked. Another user who may write there too can have put a link or a pipe in its place:
/// neither is followed or waited for. `options` must not truncate, as the file is checked after it is open.
pub(crate) fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(options, libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let refuse = |reason: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("{}: {reason}", path.display()));
    let opened = options.open(path);
    if opened.is_err() && fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink()) {
        return Err(refuse("it is a symbolic link, which is not followed"));
    }
    let file = opened?;
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(refuse("it is not a file"));
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let named = fs::symlink_metadata(path)?;
        // One that was replaced meanwhile has no name any more.
        if found.nlink() > 1 || found.nlink() == 1 && (found.dev(), found.ino()) != (named.dev(), named.ino()) {
            return Err(refuse("it is also the file of another name"));
        }
    }
    Ok(file)
}

/// The text of a small file from its beginning. A longer one is none of the kit's.
pub(crate) fn text(mut file: &File) -> io::Result<String> {
    let mut text = String::new();
    file.rewind()?;
    file.take(LONGEST).read_to_string(&mut text)?;
    Ok(text)
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.process {
            Some(id) if id == process::id() => write!(f, "this process (`{}`)", self.label),
            Some(id) => write!(f, "process {id} (`{}`)", self.label),
            None => f.write_str("a process that cannot be named"),
        }
    }
}

fn unless_taken(outcome: Result<(), TryLockError>) -> io::Result<bool> {
    match outcome {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn what_is_not_a_file_of_one_name_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let (victim, path) = (temp.path().join("victim"), temp.path().join("lock"));
        fs::write(&victim, "precious").unwrap();
        let refused = || {
            let error = LockFile::open(&path).unwrap_err().to_string();
            assert_eq!(holder(&path), None);
            fs::remove_file(&path).unwrap();
            assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
            error
        };
        std::os::unix::fs::symlink(&victim, &path).unwrap();
        assert!(refused().contains("symbolic link"));
        std::os::unix::fs::symlink(temp.path().join("nothing"), &path).unwrap();
        assert!(refused().contains("symbolic link"));
        fs::hard_link(&victim, &path).unwrap();
        assert!(refused().contains("another name"));
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        assert!(refused().contains("not a file"));
    }

    #[test]
    fn openings_exclude_each_other_and_tell_who() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("a/lock");
        assert_eq!(holder(&path), None);
        let (one, other) = (LockFile::open(&path).unwrap(), LockFile::open(&path).unwrap());
        assert!(one.try_lock().unwrap() && !other.try_lock().unwrap() && !other.try_lock_shared().unwrap());
        assert_eq!(holder(&path), Some(Who { process: None, label: String::new() }));
        one.sign(&"long".repeat(99)).unwrap();
        one.sign("a\ntest").unwrap();
        assert_eq!(holder(&path), Some(Who { process: Some(process::id()), label: "a test".to_owned() }));
        one.unlock().unwrap();
        assert_eq!(holder(&path), None);
        assert!(other.try_lock().unwrap());
    }
}
