use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// A shell that is the parent of one server and the owner of its folder.
///
/// It obeys lines from a pipe that only this process writes to. However this process ends, the pipe closes, and then
/// the shell stops the server, waits for it and removes the folder. It is in a process group of its own, so that
/// Ctrl-C at a terminal does not reach it.
pub struct Keeper {
    shell: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

const SCRIPT: &str = r#"
trap : PIPE
while IFS= read -r order; do eval "$order"; done
cd /
if [ -n "$pid" ]; then kill "-$1" "$pid"; kill -CONT "$pid"; wait "${pid#-}"; fi 2>/dev/null
rm -rf "$2" 2>/dev/null || { sleep 0.2; rm -rf "$2"; }
"#;

impl Keeper {
    pub fn new(folder: &Path, stop_signal: &str) -> Result<Keeper, String> {
        let mut shell = Command::new("sh")
            .args(["-c", SCRIPT, "keeper", stop_signal])
            .arg(folder)
            .current_dir(folder)
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(|error| format!("sh: {error}"))?;
        let orders = shell.stdin.take();
        let answers = BufReader::new(shell.stdout.take().expect("stdout is piped"));
        Ok(Keeper { shell, orders, answers })
    }

    /// Runs a command to its end; its exit status.
    pub fn run(&mut self, command: &str) -> Result<u32, String> {
        self.order(&format!("{command} </dev/null >>log 2>&1; echo $?"))
    }

    /// Starts the server; its process id.
    pub fn start(&mut self, command: &str) -> Result<u32, String> {
        self.order(&format!("{command} </dev/null >>log 2>&1 & pid=$!; echo $pid"))
    }

    /// Starts a program that starts others: they are one process group, which ends as one. Its process id.
    pub fn start_group(&mut self, command: &str) -> Result<u32, String> {
        self.order(&format!("setsid {command} </dev/null >>log 2>&1 & pid=-$!; echo ${{pid#-}}"))
    }

    /// Ends the server with `kill -9` and reaps it.
    pub fn kill(&mut self) -> Result<(), String> {
        self.order("{ kill -KILL $pid; wait $pid; } 2>/dev/null; pid=; echo 0").map(drop)
    }

    fn order(&mut self, line: &str) -> Result<u32, String> {
        let orders = self.orders.as_mut().expect("open until dropped");
        let mut answer = String::new();
        writeln!(orders, "{line}")
            .and_then(|()| self.answers.read_line(&mut answer))
            .map_err(|error| format!("the keeper of the server is gone: {error}"))?;
        answer.trim().parse().map_err(|_| format!("the keeper of the server answered `{}`", answer.trim()))
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.orders = None;
        let _ = self.shell.wait();
    }
}
