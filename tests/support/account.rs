use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

/// Whom a server runs as. Both servers refuse root, so root becomes one of the unprivileged users.
pub enum Account {
    Ourselves,
    Unprivileged { uid: u32, gid: u32 },
}

impl Account {
    /// `ours` is a file made by this process; its owner is the user of this process.
    pub fn choose(ours: &Path, candidates: &[&str]) -> Result<Account, String> {
        let uid = fs::metadata(ours).map_err(|error| format!("{}: {error}", ours.display()))?.uid();
        if uid != 0 {
            return Ok(Account::Ourselves);
        }
        let passwd = fs::read_to_string("/etc/passwd").map_err(|error| format!("/etc/passwd: {error}"))?;
        let found = candidates.iter().find_map(|name| lookup(&passwd, name));
        found.ok_or_else(|| format!("we are root, the server refuses root, and there is no user among {candidates:?}"))
    }

    /// The words that go before a command.
    pub fn prefix(&self) -> Vec<String> {
        match self {
            Account::Ourselves => Vec::new(),
            Account::Unprivileged { uid, gid } => {
                ["setpriv".to_owned(), format!("--reuid={uid}"), format!("--regid={gid}"), "--clear-groups".to_owned()]
                    .into()
            }
        }
    }

    pub fn own(&self, path: &Path) -> Result<(), String> {
        match *self {
            Account::Ourselves => Ok(()),
            Account::Unprivileged { uid, gid } => {
                chown(path, Some(uid), Some(gid)).map_err(|error| format!("chown {}: {error}", path.display()))
            }
        }
    }
}

fn lookup(passwd: &str, name: &str) -> Option<Account> {
    let fields = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| fields[0] == name)?;
    Some(Account::Unprivileged { uid: fields.get(2)?.parse().ok()?, gid: fields.get(3)?.parse().ok()? })
}
