//! The folder that the test processes of this machine share.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Names another folder.
const VARIABLE: &str = "DIESEL_SESSION_TEST_DIR";

/// The folder, made at first use: `$DIESEL_SESSION_TEST_DIR`, or one of this user's among the temporary files.
pub(super) fn folder() -> Result<&'static Path, String> {
    static FOLDER: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    FOLDER.get_or_init(make).as_deref().map_err(Clone::clone)
}

fn make() -> Result<PathBuf, String> {
    let path = match std::env::var_os(VARIABLE).filter(|path| !path.is_empty()) {
        Some(path) => PathBuf::from(path),
        None => std::env::temp_dir().join(format!("diesel-session-{}", user())),
    };
    let failed = |error| format!("the folder {} cannot be used: {error}; {VARIABLE} names another", path.display());
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(&path).map_err(failed)?;
    // Somebody else's folder is found out here, and not by every test.
    let probe = path.join(format!("probe-{}", std::process::id()));
    fs::write(&probe, "").map_err(failed)?;
    fs::remove_file(&probe).map_err(failed)?;
    path.canonicalize().map_err(failed)
}

/// A word for the user; folders of several users lie side by side.
fn user() -> String {
    let name = ["USER", "LOGNAME", "USERNAME"].into_iter().find_map(|variable| std::env::var(variable).ok());
    let word: String = name.unwrap_or_default().chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
    if word.is_empty() { "any".into() } else { word }
}
