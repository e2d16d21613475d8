//! A file whose lock shows that a process holds it, and whose text names that process.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::Path;
use std::time::{Duration, Instant};
use std::{fmt, process};

use super::shared_folder::make_inside;

/// The maximum length of a label, in characters.
const MAX_LABEL_CHARS: usize = 120;

/// The maximum length of a text that is read, in bytes.
const MAX_TEXT_BYTES: u64 = 4096;

/// An open file description. A lock belongs to the description: two descriptions of one file exclude each other also
/// within a process, and the system releases the lock when the process ends, also after a kill.
#[derive(Debug)]
pub(crate) struct LockFile(File);

/// The process that wrote the text of a lock file. It is for messages only: a holder locks the file before it writes
/// the text, and the text remains after the unlock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LockHolder {
    /// `None` if the text cannot be parsed.
    pub(crate) process: Option<u32>,
    pub(crate) label: String,
}

impl LockFile {
    /// Opens the file. Creates the file and its folder if they do not exist.
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

    /// Tries to lock the file exclusively. Returns whether this object holds the lock now.
    pub(crate) fn try_lock(&self) -> io::Result<bool> {
        locked(self.0.try_lock())
    }

    /// Tries to lock the file in shared mode. Returns whether this object holds the lock now.
    pub(crate) fn try_lock_shared(&self) -> io::Result<bool> {
        locked(self.0.try_lock_shared())
    }

    /// Waits for the exclusive lock until `deadline`. Returns whether this object holds the lock then.
    pub(crate) fn lock_until(&self, deadline: Instant) -> io::Result<bool> {
        while !self.try_lock()? {
            if Instant::now() >= deadline {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(true)
    }

    /// Releases the lock. If a child process has inherited the description, a close in this process does not release
    /// the lock; this method does.
    pub(crate) fn unlock(&self) -> io::Result<()> {
        self.0.unlock()
    }

    /// Writes the id of this process and `label` into the file. The caller holds the lock.
    pub(crate) fn write_holder(&self, label: &str) -> io::Result<()> {
        let label: String = label.chars().take(MAX_LABEL_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect();
        let mut file = &self.0;
        file.set_len(0)?;
        file.rewind()?;
        file.write_all(format!("{} {label}\n", process::id()).as_bytes())
    }
}

/// The holder of the file's lock, if the file is locked. If the file is not locked, the function holds a shared lock
/// for a moment.
pub(crate) fn holder_of(path: &Path) -> Option<LockHolder> {
    let file = open(path, OpenOptions::new().read(true)).ok()?;
    if file.try_lock_shared().is_ok() {
        // If this fails, the close releases the lock.
        let _ = file.unlock();
        return None;
    }
    let text = read_text(&file).unwrap_or_default();
    let (process, label) = text.trim_end().split_once(' ').unwrap_or_default();
    Some(LockHolder { process: process.parse().ok(), label: label.to_owned() })
}

/// Opens a file in a checked folder. Another user with write access may have put a link or a pipe there: the function
/// does not follow the link and does not wait for the pipe. `options` must not truncate, because the file is checked
/// after it is open.
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
        // A file without a name is one that was replaced after it was opened.
        if found.nlink() > 1 || found.nlink() == 1 && (found.dev(), found.ino()) != (named.dev(), named.ino()) {
            return Err(refuse("it is also the file of another name"));
        }
    }
    Ok(file)
}

/// The first [`MAX_TEXT_BYTES`] bytes of a file as text. The test kit writes no longer file.
pub(crate) fn read_text(mut file: &File) -> io::Result<String> {
    let mut text = String::new();
    file.rewind()?;
    file.take(MAX_TEXT_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

impl fmt::Display for LockHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.process {
            Some(id) if id == process::id() => write!(f, "this process (`{}`)", self.label),
            Some(id) => write!(f, "process {id} (`{}`)", self.label),
            None => f.write_str("a process that cannot be named"),
        }
    }
}

fn locked(outcome: Result<(), TryLockError>) -> io::Result<bool> {
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
    fn lock_file_refuses_links_and_pipes() {
        let temp = tempfile::tempdir().unwrap();
        let (victim, path) = (temp.path().join("victim"), temp.path().join("lock"));
        fs::write(&victim, "precious").unwrap();
        let refused = || {
            let error = LockFile::open(&path).unwrap_err().to_string();
            assert_eq!(holder_of(&path), None);
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
    fn open_lock_files_exclude_each_other_and_name_the_holder() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("a/lock");
        assert_eq!(holder_of(&path), None);
        let (one, other) = (LockFile::open(&path).unwrap(), LockFile::open(&path).unwrap());
        assert!(one.try_lock().unwrap() && !other.try_lock().unwrap() && !other.try_lock_shared().unwrap());
        assert_eq!(holder_of(&path), Some(LockHolder { process: None, label: String::new() }));
        one.write_holder(&"long".repeat(99)).unwrap();
        one.write_holder("a\ntest").unwrap();
        assert_eq!(holder_of(&path), Some(LockHolder { process: Some(process::id()), label: "a test".to_owned() }));
        one.unlock().unwrap();
        assert_eq!(holder_of(&path), None);
        assert!(other.try_lock().unwrap());
    }
}
