//! A file whose lock shows that a process holds it, and whose text names that process.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::Path;
use std::time::{Duration, Instant};
use std::{process, thread};

use super::shared_folder::make_inside;

/// The maximum length of a label, in characters.
const MAX_LABEL_CHARS: usize = 120;

/// The maximum length of a text that is read, in bytes. The test kit writes no longer file.
const MAX_TEXT_BYTES: u64 = 4096;

/// The shortest pause between two attempts to lock a file.
pub(super) const PAUSE: Duration = Duration::from_millis(1);

/// The first pause. Each further pause is shorter, so that a thread that has waited for longer usually precedes others.
const FIRST_PAUSE: Duration = Duration::from_millis(6);

/// An open file description. A lock belongs to the description: two descriptions of one file exclude each other also
/// within a process, and the system releases the lock when the process ends, also after a kill.
#[derive(Debug)]
pub(super) struct LockFile {
    file: File,
    process: u32,
}

impl LockFile {
    /// Opens the file. Creates the file and its folder if they do not exist.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let open = || self::open(path, File::options().read(true).write(true).create(true).truncate(false));
        let file = match (open(), path.parent()) {
            (Err(error), Some(parent)) if error.kind() == io::ErrorKind::NotFound => {
                make_inside(parent)?;
                open()?
            }
            (opened, _) => opened?,
        };
        Ok(Self { file, process: process::id() })
    }

    /// Tries to lock the file exclusively. Returns whether this object holds the lock now.
    pub(super) fn try_lock(&self) -> io::Result<bool> {
        match self.file.try_lock() {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Waits for the lock until `deadline`. Returns whether this object holds the lock then. The method polls, because
    /// file locks have no timeout.
    pub(super) fn lock_until(&self, deadline: Instant) -> io::Result<bool> {
        let mut pause = FIRST_PAUSE;
        while !self.try_lock()? {
            if Instant::now() >= deadline {
                return Ok(false);
            }
            thread::sleep(pause);
            pause = pause.saturating_sub(PAUSE).max(PAUSE);
        }
        Ok(true)
    }

    pub(super) fn unlock(&self) -> io::Result<()> {
        self.file.unlock()
    }

    /// Writes the id of this process and `label` into the file. The caller holds the lock. The text is for messages
    /// only, because it remains after the unlock.
    pub(super) fn write_holder(&self, label: &str) -> io::Result<()> {
        let label: String = label.chars().take(MAX_LABEL_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect();
        let mut file = &self.file;
        file.set_len(0)?;
        file.rewind()?;
        file.write_all(format!("{} {label}\n", process::id()).as_bytes())
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        // The close does not release the lock if a child process has inherited the description. A child process must
        // not release the lock of its parent.
        if self.process == process::id() {
            let _ = self.unlock();
        }
    }
}

/// The description of the process that holds the file's lock, if the file is locked. If the file is not locked, the
/// function holds a shared lock for a moment.
pub(super) fn holder_of(path: &Path) -> Option<String> {
    let file = open(path, File::options().read(true)).ok()?;
    if file.try_lock_shared().is_ok() {
        // If this fails, the close releases the lock.
        let _ = file.unlock();
        return None;
    }
    let text = read_text(&file).unwrap_or_default();
    let (process, label) = text.trim_end().split_once(' ').unwrap_or_default();
    Some(match process.parse() {
        Ok(id) if process::id() == id => format!("this process (`{label}`)"),
        Ok(id) => format!("process {id} (`{label}`)"),
        Err(_) => "a process that cannot be named".into(),
    })
}

/// Opens a file in a checked folder. Another user with write access may have put a link or a pipe there: the function
/// does not follow the link and does not wait for the pipe. `options` must not truncate, because the file is checked
/// after it is open.
pub(super) fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
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

/// The first [`MAX_TEXT_BYTES`] bytes of a file as text.
pub(super) fn read_text(file: &File) -> io::Result<String> {
    let mut text = String::new();
    file.take(MAX_TEXT_BYTES).read_to_string(&mut text)?;
    Ok(text)
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
        assert!(one.try_lock().unwrap() && !other.try_lock().unwrap());
        assert_eq!(holder_of(&path), Some("a process that cannot be named".to_owned()));
        one.write_holder(&"long".repeat(99)).unwrap();
        one.write_holder("a\ntest").unwrap();
        assert_eq!(holder_of(&path), Some("this process (`a test`)".to_owned()));
        one.unlock().unwrap();
        assert_eq!(holder_of(&path), None);
        assert!(other.try_lock().unwrap());
    }
}
