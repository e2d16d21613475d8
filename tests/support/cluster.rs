use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use super::account::Account;
use super::keeper::Keeper;
use super::{process, text, wait};

const START_LIMIT: Duration = Duration::from_secs(30);

/// A temporary folder and the server that lives in it; dropping it, or the end of this process, removes both.
pub struct Cluster {
    folder: PathBuf,
    account: Account,
    server: Mutex<Server>,
}

struct Server {
    keeper: Keeper,
    pid: Option<u32>,
}

impl Cluster {
    pub fn new(users: &[&str], stop_signal: &str) -> Result<Cluster, String> {
        let folder = tempfile::Builder::new().prefix("diesel-session-").tempdir();
        let folder = folder.map_err(|error| format!("no temporary folder: {error}"))?;
        let account = Account::choose(folder.path(), users)?;
        account.own(folder.path())?;
        let keeper = Keeper::new(folder.path(), stop_signal)?;
        Ok(Cluster { folder: folder.keep(), account, server: Mutex::new(Server { keeper, pid: None }) })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A path inside the folder, as text for a command line.
    pub fn path(&self, name: &str) -> String {
        self.folder.join(name).into_os_string().into_string().expect("the temporary folder has a UTF-8 name")
    }

    /// Writes a file that the server may read.
    pub fn write(&self, name: &str, content: &str) -> Result<(), String> {
        let path = self.folder.join(name);
        fs::write(&path, content).map_err(|error| format!("{}: {error}", path.display()))?;
        self.account.own(&path)
    }

    /// Runs a command that prepares the folder, as the server's user.
    pub fn run(&self, program: &Path, args: &[String]) -> Result<(), String> {
        match self.lock().keeper.run(&self.command(program, args))? {
            0 => Ok(()),
            status => Err(format!("{} ended with status {status}{}", program.display(), self.log())),
        }
    }

    /// Starts the server and waits until it is `ready`.
    pub fn start(&self, program: &Path, args: &[String], mut ready: impl FnMut() -> bool) -> Result<(), String> {
        let mut server = self.lock();
        let pid = server.keeper.start(&self.command(program, args))?;
        let mut is_ready = false;
        wait::until(START_LIMIT, || {
            let was_alive = process::alive(pid);
            is_ready = ready();
            is_ready || !was_alive
        });
        if is_ready {
            server.pid = Some(pid);
            return Ok(());
        }
        server.keeper.kill()?;
        Err(format!("{} did not come up{}", program.display(), self.log()))
    }

    /// `kill -9` of the server and of the processes it has forked.
    pub fn kill(&self) {
        let mut server = self.lock();
        let pid = server.pid.take().expect("the server runs");
        let children = process::children(pid);
        server.keeper.kill().expect("the keeper kills");
        process::signal("KILL", &children);
    }

    pub fn pid(&self) -> u32 {
        self.lock().pid.expect("the server runs")
    }

    fn command(&self, program: &Path, args: &[String]) -> String {
        let program = program.to_str().expect("programs have UTF-8 names").to_owned();
        let words = self.account.prefix().into_iter().chain([program]).chain(args.iter().cloned());
        words.map(|word| text::shell_quoted(&word)).collect::<Vec<_>>().join(" ")
    }

    fn log(&self) -> String {
        let log = fs::read(self.folder.join("log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        format!("; the end of its log:\n{}", lines[lines.len().saturating_sub(30)..].join("\n"))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Server> {
        self.server.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
