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
pub(crate) fn folder() -> Result<&'static Path, String> {
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
            let made = private(DirBuilder::new().recursive(true)).create(&path).and_then(|()| try_out(&path).map(drop));
            (path, made)
        }
        None => {
            let path = temp.join(format!("diesel-session-{}", plain(user)));
            let made = make_ours(&path);
            (path, made)
        }
    };
    match made {
        Ok(()) => Ok(path),
        Err(error) => Err(format!(
            "the folder that test processes share cannot be used: {}: {error}; {VARIABLE} names another one",
            path.display()
        )),
    }
}

/// A user's name as part of a file's.
fn plain(user: Option<OsString>) -> String {
    let user = user.unwrap_or_default();
    let user = user.to_string_lossy();
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
    let name: String = user.chars().take(64).map(plain).collect();
    if name.is_empty() { "any".to_owned() } else { name }
}

/// Where everybody may make files, another user may have made this one first, or a link to somewhere.
fn make_ours(path: &Path) -> io::Result<()> {
    match private(&mut DirBuilder::new()).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => made?,
    }
    let found = fs::symlink_metadata(path)?;
    if !found.is_dir() {
        return Err(io::Error::new(io::ErrorKind::NotADirectory, "it is not a folder"));
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        if found.uid() != try_out(path)?.uid() {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it belongs to another user"));
        }
        if found.mode() & 0o777 != 0o700 {
            fs::set_permissions(path, fs::Permissions::from_mode(0o700))?;
        }
    }
    #[cfg(not(unix))]
    try_out(path)?;
    Ok(())
}

/// Whether files can be made in there, and what such a file is like.
fn try_out(path: &Path) -> io::Result<fs::Metadata> {
    let trial = path.join(format!("trial-{}", process::id()));
    let found = File::create(&trial)?.metadata();
    fs::remove_file(&trial)?;
    found
}

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
    fn a_named_one_that_exists_keeps_its_permissions() {
        let temp = tempfile::tempdir().unwrap();
        let named = temp.path().join("a/b");
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
