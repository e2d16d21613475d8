//! The folder that all test processes of one user on this machine share.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::{env, io};

/// The environment variable that names another folder.
const VARIABLE: &str = "DIESEL_SESSION_TEST_DIR";

/// The path of the folder: `$DIESEL_SESSION_TEST_DIR`, or `diesel-session-<user>` in the system's folder for temporary
/// files. The first call creates the folder, and only its user can access it. An existing folder that the variable
/// names keeps its permissions.
///
/// Another user may have created the folder first. So the folder is checked before a file is created in it, and no file
/// in it is opened through a link ([`super::lock_file::open`]).
pub(crate) fn shared_folder() -> Result<&'static Path, String> {
    static FOLDER: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let created = FOLDER.get_or_init(|| {
        let user = ["USER", "LOGNAME", "USERNAME"].into_iter().find_map(env::var_os);
        prepare(env::var_os(VARIABLE).filter(|named| !named.is_empty()), &env::temp_dir(), user)
    });
    created.as_deref().map_err(Clone::clone)
}

fn prepare(named: Option<OsString>, temp: &Path, user: Option<OsString>) -> Result<PathBuf, String> {
    let is_named = named.is_some();
    let path = named.map_or_else(|| temp.join(format!("diesel-session-{}", sanitized(user))), PathBuf::from);
    // Tests may change their current directory, and other processes may have another one.
    let path = std::path::absolute(&path).unwrap_or(path);
    let created = if is_named { make_named(&path) } else { make_private(&path).map(|()| path.clone()) };
    created.map_err(|error| {
        format!(
            "the folder that test processes share cannot be used: {}: {error}; {VARIABLE} names another one",
            path.display()
        )
    })
}

fn make_named(path: &Path) -> io::Result<PathBuf> {
    builder(0o700).recursive(true).create(path)?;
    refuse_replaceable(&fs::metadata(path)?)?;
    fs::canonicalize(path)
}

/// The name of a user as part of a file name.
fn sanitized(user: Option<OsString>) -> String {
    let user = user.unwrap_or_default();
    let user = user.to_string_lossy();
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
    let name: String = user.chars().take(64).map(plain).collect();
    if name.is_empty() { "any".to_owned() } else { name }
}

/// Creates or checks a folder that only this user can access. If every user can create files in the parent folder,
/// another user may have created the folder, or a link, first.
fn make_private(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        let parent_is_safe = refuse_replaceable(&fs::metadata(parent)?);
        parent_is_safe.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", parent.display())))?;
    }
    let folder = make_or_open(path, 0o700)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        let found = folder.metadata()?;
        if found.uid() != current_user()? {
            return Err(belongs_to_another_user());
        }
        if found.mode() & 0o777 != 0o700 {
            folder.set_permissions(fs::Permissions::from_mode(0o700))?;
        }
    }
    drop(folder);
    Ok(())
}

/// Creates or checks a folder in a checked folder: in `shared_folder` or in a folder that this function has created.
/// The function refuses a link, and a folder that another user has created or can replace.
pub(super) fn make_inside(path: &Path) -> io::Result<()> {
    let made = match path.parent() {
        // Another program has cleared the temporary files.
        Some(parent) if !parent.exists() => make_inside(parent).and_then(|()| make_or_open(path, 0o775)),
        _ => make_or_open(path, 0o775),
    };
    let found = made?.metadata()?;
    refuse_replaceable(&found)?;
    #[cfg(unix)]
    if let Some(parent) = path.parent() {
        use std::os::unix::fs::MetadataExt;
        let parent = fs::metadata(parent)?;
        refuse_replaceable(&parent)?;
        let everybody_may_write = parent.mode() & 0o002 != 0;
        if everybody_may_write && found.uid() != parent.uid() && found.uid() != current_user()? {
            return Err(belongs_to_another_user());
        }
    }
    Ok(())
}

#[cfg(unix)]
fn belongs_to_another_user() -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, "it belongs to another user")
}

/// Creates or checks a folder in `folder` that only this user can access. If `name` belongs to another user, the folder
/// gets another name. Returns its path.
pub(super) fn make_private_inside(folder: &Path, name: &str) -> io::Result<PathBuf> {
    let path = folder.join(name);
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let user = current_user()?;
        let belongs_to_another_user = fs::symlink_metadata(&path).is_ok_and(|found| found.uid() != user);
        let path = if belongs_to_another_user { folder.join(format!("{name}-{user}")) } else { path };
        make_private(&path)?;
        Ok(path)
    }
    #[cfg(not(unix))]
    make_private(&path).map(|()| path)
}

/// Creates a folder with the permissions `mode`, unless it exists, and opens it. The function does not follow a link.
fn make_or_open(path: &Path, mode: u32) -> io::Result<File> {
    match builder(mode).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        created => created?,
    }
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

/// The flag that Windows requires to open a folder.
#[cfg(windows)]
const BACKUP_SEMANTICS: u32 = 0x0200_0000;

/// Refuses a folder in which every user can replace the files of other users.
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

/// The id of the user to whom the files of this process belong.
#[cfg(unix)]
fn current_user() -> io::Result<u32> {
    let (pipe, _) = io::pipe()?;
    let pipe = File::from(std::os::fd::OwnedFd::from(pipe));
    Ok(std::os::unix::fs::MetadataExt::uid(&pipe.metadata()?))
}

#[cfg_attr(not(unix), allow(unused_variables, reason = "only Unix has modes"))]
fn builder(mode: u32) -> DirBuilder {
    let mut builder = DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, mode);
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
    fn shared_folder_is_private_to_its_user() {
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
    fn shared_folder_does_not_follow_links() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let temp = tempfile::tempdir().unwrap();
        let victim = temp.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        for mode in [0o700, 0o777, 0o1777] {
            let folder = temp.path().join(format!("diesel-session-{mode:o}"));
            fs::create_dir(&folder).unwrap();
            symlink(&victim, folder.join("lock")).unwrap();
            fs::set_permissions(&folder, fs::Permissions::from_mode(mode)).unwrap();
            let _ = prepare(None, temp.path(), Some(format!("{mode:o}").into()));
            fs::set_permissions(&folder, fs::Permissions::from_mode(mode)).unwrap();
            let named = prepare(Some(folder.clone().into()), temp.path(), None);
            assert_eq!(named.is_ok(), mode != 0o777, "{named:?}");
            assert!(super::super::lock_file::LockFile::open(&folder.join("lock")).is_err());
            assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
            symlink(temp.path(), folder.join("inside")).unwrap();
            assert!(make_inside(&folder.join("inside")).unwrap_err().to_string().contains("not a folder"));
            assert!(make_private_inside(&folder, "inside").is_err());
        }
    }

    #[cfg(unix)]
    #[test]
    fn shared_folder_of_another_user_is_refused() {
        use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
        let temp = tempfile::tempdir().unwrap();
        assert_eq!(current_user().unwrap(), fs::metadata(temp.path()).unwrap().uid());
        let folder = temp.path().join("diesel-session-any");
        fs::create_dir_all(folder.join("server")).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o1777)).unwrap();
        // Only root can change the owner of a folder.
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
        // A folder that the variable names is trusted, and so is its owner.
        assert!(prepare(Some(folder.clone().into()), temp.path(), None).is_ok());
        make_inside(&folder.join("server")).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn named_folder_keeps_its_permissions() {
        let temp = tempfile::tempdir().unwrap();
        let named = fs::canonicalize(temp.path()).unwrap().join("a/b");
        assert_eq!(prepare(Some(named.clone().into()), Path::new("/nowhere"), None).unwrap(), named);
        assert_eq!(mode(&named), 0o700);
        fs::set_permissions(&named, std::os::unix::fs::PermissionsExt::from_mode(0o750)).unwrap();
        prepare(Some(named.clone().into()), Path::new("/nowhere"), None).unwrap();
        assert_eq!(mode(&named), 0o750);
    }

    #[test]
    fn file_in_place_of_the_shared_folder_is_refused() {
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
