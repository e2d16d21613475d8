use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::keeper::Keeper;
use crate::support::text::shell_quoted;
use crate::support::{process, wait};

const START_LIMIT: Duration = Duration::from_secs(60);

/// A program that listens, and its folder. It is killed with all that it started, and the folder removed, when this is
/// dropped or this process ends in whatever way.
pub(crate) struct Service {
    folder: PathBuf,
    keeper: Keeper,
}

impl Service {
    pub(crate) fn new() -> Service {
        let folder = tempfile::Builder::new().prefix("diesel-session-").tempdir().expect("a temporary folder");
        let keeper = Keeper::new(folder.path(), "KILL").unwrap();
        Service { folder: folder.keep(), keeper }
    }

    /// Starts the program and waits for what its log says behind `sign`; the program's id comes first.
    ///
    /// Whatever it stores for itself goes into its folder.
    pub(crate) fn start(
        &mut self,
        program: &Path,
        variables: &[(&str, &str)],
        args: &[&str],
        sign: &str,
    ) -> (u32, String) {
        let folder = self.folder.to_str().expect("the temporary folder has a UTF-8 name");
        let own = [("HOME", folder), ("TMPDIR", folder)];
        let variables = own.iter().chain(variables).map(|(name, value)| format!("{name}={value}"));
        let program = program.to_str().expect("programs have UTF-8 names").to_owned();
        let words = variables.chain([program]).chain(args.iter().map(ToString::to_string));
        let command = words.map(|word| shell_quoted(&word)).collect::<Vec<_>>().join(" ");

        let pid = self.keeper.start_group(&format!("env {command}")).unwrap();
        let mut said = None;
        wait::until(START_LIMIT, || {
            let was_alive = process::alive(pid);
            // The last line may not be whole yet.
            let log = self.log();
            let mut lines = log.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
            said = lines.find_map(|line| line.strip_prefix(sign)).map(String::from);
            said.is_some() || !was_alive
        });
        (pid, said.unwrap_or_else(|| panic!("`{command}` did not say `{sign}`, but:\n{}", self.log())))
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// All that it has said.
    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.folder.join("log")).unwrap_or_default()).into_owned()
    }
}
