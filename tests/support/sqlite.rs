use std::path::PathBuf;

use tempfile::TempDir;

/// A database file in a folder of its own, removed on drop with everything that grew beside it.
pub struct TempSqlite {
    folder: TempDir,
}

impl TempSqlite {
    pub fn new() -> TempSqlite {
        let folder = tempfile::Builder::new().prefix("diesel-session-").tempdir();
        TempSqlite { folder: folder.expect("a temporary folder") }
    }

    pub fn url(&self) -> String {
        self.path().into_os_string().into_string().expect("the temporary folder has a UTF-8 name")
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("test.sqlite")
    }
}
