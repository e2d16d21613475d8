//! The folder that all test processes of one user on this machine share.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::{env, io, process};

/// Names another folder.
const VARIABLE: &str = "DIESEL_SESSION_TEST_DIR";

/// The folder: `$DIESEL_SESSION_TEST_DIR`, or `diesel-session-<user>` where temporary files are. It is made at first use, for its
/// user alone. One that the variable names and that exists keeps the permissions that it has.
///
/// Other users may have been there first. So a folder is checked before anything is made in it, and no file in it is opened
/// through a link ([`super::lock_file::open`]).
pub(crate) fn shared_folder() -> Result<&'static Path, String> {
    static FOLDER: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let made = FOLDER.get_or_init(|| {
        let user = ["USER", "LOGNAME", "USERNAME"].into_iter().find_map(env::var_os);
        prepare(env::var_os(VARIABLE).filter(|named| !named.is_empty()), &env::temp_dir(), user)
    });
    made.as_deref().map_err(Clone::clone)
}

fn prepare(named: Option<OsString>, temp: &Path, user: Option<OsString>) -> Result<PathBuf, String> {
    let (path, made) = match named {
        Some(named) => {
            let path = PathBuf::from(named);
            // Tests may change their current directory, and processes need not share it.
            let path = std::path::absolute(&path).unwrap_or(path);
            let made = private(DirBuilder::new().recursive(true)).create(&path).and_then(|()| fs::canonicalize(&path));
            (
                path,
                made.and_then(|path| {
                    refuse_replaceable(&fs::metadata(&path)?).and_then(|()| check_writable(&path)).map(|()| path)
                }),
            )
        }
        None => {
            let path = temp.join(format!("diesel-session-{}", sanitized(user)));
            let made = make_private(&path).and_then(|()| check_writable(&path)).map(|()| path.clone());
            (path, made)
        }
    };
    made.map_err(|error| {
        format!(
            "the folder that test processes share cannot be used: {}: {error}; {VARIABLE} names another one",
            path.display()
        )
    })
}

/// A user's name as part of a file's.
fn sanitized(user: Option<OsString>) -> String {
    let user = user.unwrap_or_default();
    let user = user.to_string_lossy();
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
    let name: String = user.chars().take(64).map(plain).collect();
    if name.is_empty() { "any".to_owned() } else { name }
}

/// Makes or checks a folder that only this user may use. If every user may make files beside it, another user may have made it
/// first, or a link to somewhere.
fn make_private(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        let parent_is_safe = refuse_replaceable(&fs::metadata(parent)?);
        parent_is_safe.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", parent.display())))?;
    }
    match private(&mut DirBuilder::new()).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => made?,
    }
    let folder = open_folder(path)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        let found = folder.metadata()?;
        if found.uid() != current_user()? {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it belongs to another user"));
        }
        if found.mode() & 0o777 != 0o700 {
            folder.set_permissions(fs::Permissions::from_mode(0o700))?;
        }
    }
    drop(folder);
    Ok(())
}

/// Makes or checks a folder inside of one that has been checked: `folder` itself or one that this function made. A link is refused,
/// and so is a folder that a stranger made or could replace.
pub(super) fn make_inside(path: &Path) -> io::Result<()> {
    #[cfg(unix)]
    let made = std::os::unix::fs::DirBuilderExt::mode(&mut DirBuilder::new(), 0o775).create(path);
    #[cfg(not(unix))]
    let made = fs::create_dir(path);
    match (made, path.parent()) {
        (Err(error), Some(parent)) if error.kind() == io::ErrorKind::NotFound && !parent.exists() => {
            // Somebody has cleared the temporary files.
            make_inside(parent)?;
            return make_inside(path);
        }
        (Err(error), _) if error.kind() == io::ErrorKind::AlreadyExists => {}
        (made, _) => made?,
    }
    let found = open_folder(path)?.metadata()?;
    refuse_replaceable(&found)?;
    #[cfg(unix)]
    if let Some(parent) = path.parent() {
        use std::os::unix::fs::MetadataExt;
        let around = fs::metadata(parent)?;
        refuse_replaceable(&around)?;
        let strangers_may_write = around.mode() & 0o002 != 0;
        if strangers_may_write && found.uid() != around.uid() && found.uid() != current_user()? {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it belongs to another user"));
        }
    }
    Ok(())
}

/// The same for this user alone; one of that name that belongs to another user stays, and the result is beside it.
pub(super) fn make_private_inside(folder: &Path, name: &str) -> io::Result<PathBuf> {
    let path = folder.join(name);
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let user = current_user()?;
        let is_anothers = fs::symlink_metadata(&path).is_ok_and(|found| found.uid() != user);
        let path = if is_anothers { folder.join(format!("{name}-{user}")) } else { path };
        make_private(&path)?;
        Ok(path)
    }
    #[cfg(not(unix))]
    make_private(&path).map(|()| path)
}

/// Opens a folder, and not what a link points to.
fn open_folder(path: &Path) -> io::Result<File> {
    if !fs::symlink_metadata(path)?.is_dir() {
        return Err(io::Error::new(io::ErrorKind::NotADirectory, "it is not a folder"));
    }
    let mut options = File::options();
    options.read(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOFOLLOW | libc::O_DIRECTORY);
    #[cfg(windows)]
    std::os::windows::fs::OpenOptionsExt::custom_flags(&mut options, BACKUP_SEMANTICS);
    options.open(path)
}

/// Without it Windows opens no folder.
#[cfg(windows)]
const BACKUP_SEMANTICS: u32 = 0x0200_0000;

/// Every user may write into `found` and rename what others have in it.
fn refuse_replaceable(found: &fs::Metadata) -> io::Result<()> {
    #[cfg(unix)]
    if std::os::unix::fs::MetadataExt::mode(found) & 0o1002 == 0o0002 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "every user of this machine may replace the files in it: `chmod +t` or `chmod o-w` prevents that",
        ));
    }
    let _ = found;
    Ok(())
}

/// The user of this process, as the owner of what it makes.
#[cfg(unix)]
fn current_user() -> io::Result<u32> {
    let (pipe, _) = io::pipe()?;
    let pipe = File::from(std::os::fd::OwnedFd::from(pipe));
    Ok(std::os::unix::fs::MetadataExt::uid(&pipe.metadata()?))
}

/// Makes a file in a folder that has been checked, and removes it.
fn check_writable(path: &Path) -> io::Result<()> {
    for number in 0.. {
        let trial = path.join(format!("trial-{}-{number}", process::id()));
        match File::create_new(&trial) {
            // A process of that number that was killed has left it, or somebody else has put a link there.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < MOST_TRIALS => {}
            Err(error) => return Err(error),
            Ok(_) => return fs::remove_file(&trial),
        }
    }
    Ok(())
}

/// How many names of a trial may be taken.
const MOST_TRIALS: usize = 100;

fn private(builder: &mut DirBuilder) -> &mut DirBuilder {
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(builder, 0o700);
    builder
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    fn mode(path: &Path) -> u32 {
        std::os::unix::fs::PermissionsExt::mode(&fs::metadata(path).unwrap().permissions()) & 0o777
    }

    #[test]
    fn it_is_made_for_its_user_alone() {
        let temp = tempfile::tempdir().unwrap();
        let path = prepare(None, temp.path(), Some("../ada b".into())).unwrap();
        assert_eq!(path, temp.path().join("diesel-session-.._ada_b"));
        assert_eq!(prepare(None, temp.path(), None).unwrap(), temp.path().join("diesel-session-any"));
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
        #[cfg(unix)]
        {
            assert_eq!(mode(&path), 0o700);
            fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
            prepare(None, temp.path(), Some("../ada b".into())).unwrap();
            assert_eq!(mode(&path), 0o700);
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_link_in_the_place_of_a_file_or_folder_is_not_followed() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let temp = tempfile::tempdir().unwrap();
        let victim = temp.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        for mode in [0o700, 0o777, 0o1777] {
            let folder = temp.path().join(format!("diesel-session-{mode:o}"));
            fs::create_dir(&folder).unwrap();
            symlink(&victim, folder.join(format!("trial-{}", process::id()))).unwrap();
            symlink(&victim, folder.join(format!("trial-{}-0", process::id()))).unwrap();
            fs::set_permissions(&folder, fs::Permissions::from_mode(mode)).unwrap();
            let _ = prepare(None, temp.path(), Some(format!("{mode:o}").into()));
            fs::set_permissions(&folder, fs::Permissions::from_mode(mode)).unwrap();
            let named = prepare(Some(folder.clone().into()), temp.path(), None);
            assert_eq!(named.is_ok(), mode != 0o777, "{named:?}");
            assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
            symlink(temp.path(), folder.join("inside")).unwrap();
            assert!(make_inside(&folder.join("inside")).unwrap_err().to_string().contains("not a folder"));
            assert!(make_private_inside(&folder, "inside").is_err());
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_of_another_user_is_refused() {
        use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
        let temp = tempfile::tempdir().unwrap();
        assert_eq!(current_user().unwrap(), fs::metadata(temp.path()).unwrap().uid());
        let folder = temp.path().join("diesel-session-any");
        fs::create_dir_all(folder.join("server")).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o1777)).unwrap();
        // Only root may give a folder away, as the gate's machine is.
        if chown(folder.join("server"), Some(12345), None).is_err() {
            return;
        }
        assert!(make_inside(&folder.join("server")).unwrap_err().to_string().contains("another user"));
        let ours = make_private_inside(&folder, "server").unwrap();
        assert_ne!(ours, folder.join("server"));
        assert_eq!(mode(&ours), 0o700);
        chown(&folder, Some(12345), None).unwrap();
        let error = prepare(None, temp.path(), None).unwrap_err();
        assert!(error.contains("it belongs to another user"), "{error}");
        // One that the user has named is trusted, and so is its owner.
        assert!(prepare(Some(folder.clone().into()), temp.path(), None).is_ok());
        make_inside(&folder.join("server")).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn a_named_one_that_exists_keeps_its_permissions() {
        let temp = tempfile::tempdir().unwrap();
        let named = fs::canonicalize(temp.path()).unwrap().join("a/b");
        assert_eq!(prepare(Some(named.clone().into()), Path::new("/nowhere"), None).unwrap(), named);
        assert_eq!(mode(&named), 0o700);
        fs::set_permissions(&named, std::os::unix::fs::PermissionsExt::from_mode(0o750)).unwrap();
        prepare(Some(named.clone().into()), Path::new("/nowhere"), None).unwrap();
        assert_eq!(mode(&named), 0o750);
    }

    #[test]
    fn what_is_no_folder_is_refused_by_name() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("diesel-session-any");
        fs::write(&path, "").unwrap();
        let error = prepare(None, temp.path(), None).unwrap_err();
        assert!(error.contains("diesel-session-any: it is not a folder; DIESEL_SESSION_TEST_DIR"), "{error}");
        #[cfg(unix)]
        {
            fs::remove_file(&path).unwrap();
            std::os::unix::fs::symlink(temp.path(), &path).unwrap();
            assert!(prepare(None, temp.path(), None).unwrap_err().contains("it is not a folder"));
        }
        let error = prepare(Some(temp.path().join("diesel-session-any/x\0").into()), temp.path(), None).unwrap_err();
        assert!(error.contains("cannot be used"), "{error}");
    }
}
