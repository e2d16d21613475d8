//! The folder that all test processes of one user on this machine share.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::{env, io, process};

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
    let (path, created) = match named {
        Some(named) => {
            let path = PathBuf::from(named);
            // Tests may change their current directory, and other processes may have another one.
            let path = std::path::absolute(&path).unwrap_or(path);
            let created =
                private(DirBuilder::new().recursive(true)).create(&path).and_then(|()| fs::canonicalize(&path));
            (
                path,
                created.and_then(|path| {
                    refuse_replaceable(&fs::metadata(&path)?).and_then(|()| check_writable(&path)).map(|()| path)
                }),
            )
        }
        None => {
            let path = temp.join(format!("diesel-session-{}", sanitized(user)));
            let created = make_private(&path).and_then(|()| check_writable(&path)).map(|()| path.clone());
            (path, created)
        }
    };
    created.map_err(|error| {
        format!(
            "the folder that test processes share cannot be used: {}: {error}; {VARIABLE} names another one",
            path.display()
        )
    })
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
    match private(&mut DirBuilder::new()).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        created => created?,
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

/// Creates or checks a folder in a checked folder: in `shared_folder` or in a folder that this function has created.
/// The function refuses a link, and a folder that another user has created or can replace.
pub(super) fn make_inside(path: &Path) -> io::Result<()> {
    #[cfg(unix)]
    let created = std::os::unix::fs::DirBuilderExt::mode(&mut DirBuilder::new(), 0o775).create(path);
    #[cfg(not(unix))]
    let created = fs::create_dir(path);
    match (created, path.parent()) {
        (Err(error), Some(parent)) if error.kind() == io::ErrorKind::NotFound && !parent.exists() => {
            // Another program has cleared the temporary files.
            make_inside(parent)?;
            return make_inside(path);
        }
        (Err(error), _) if error.kind() == io::ErrorKind::AlreadyExists => {}
        (created, _) => created?,
    }
    let found = open_folder(path)?.metadata()?;
    refuse_replaceable(&found)?;
    #[cfg(unix)]
    if let Some(parent) = path.parent() {
        use std::os::unix::fs::MetadataExt;
        let parent = fs::metadata(parent)?;
        refuse_replaceable(&parent)?;
        let everybody_may_write = parent.mode() & 0o002 != 0;
        if everybody_may_write && found.uid() != parent.uid() && found.uid() != current_user()? {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it belongs to another user"));
        }
    }
    Ok(())
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

/// Opens a folder. The function does not follow a link.
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

/// Checks that this process can create files in a checked folder.
fn check_writable(path: &Path) -> io::Result<()> {
    for number in 0.. {
        let trial = path.join(format!("trial-{}-{number}", process::id()));
        match File::create_new(&trial) {
            // A killed process with the same id has left the file, or another user has put a link there.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < MAX_TRIALS => {}
            Err(error) => return Err(error),
            Ok(_) => return fs::remove_file(&trial),
        }
    }
    Ok(())
}

/// How many existing files [`check_writable`] accepts before it gives up.
const MAX_TRIALS: usize = 100;

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
