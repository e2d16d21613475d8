//! The test binaries, built by Cargo.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub struct Binaries(Vec<PathBuf>);

impl Binaries {
    pub fn build() -> Result<Self, String> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command.args(["test", "--release", "--no-run", "--tests", "--message-format=json"]);
        command.current_dir(env!("CARGO_MANIFEST_DIR")).stderr(Stdio::inherit());
        let output = command.output().map_err(|error| format!("cargo cannot be run: {error}"))?;
        if !output.status.success() {
            return Err("the tests cannot be built".to_owned());
        }
        let messages = String::from_utf8_lossy(&output.stdout);
        let paths = messages.lines().filter_map(|line| line.split_once("\"executable\":\"")?.1.split('"').next());
        Ok(Self(paths.map(PathBuf::from).collect()))
    }

    /// The binary of the test target of that name.
    pub fn of(&self, target: &str) -> Result<PathBuf, String> {
        let is_it = |path: &&PathBuf| stem(path).rsplit_once('-').is_some_and(|(name, _)| name == target);
        self.0.iter().find(is_it).cloned().ok_or_else(|| format!("there is no test target `{target}`"))
    }
}

fn stem(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}
