//! The files of the kit: in folders into which other users may write, with odd names, and on a disk that is full.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::child::Run;
use super::server::Server;

/// A test's process that takes its folder from the directory of temporary files.
fn run_in(temp: &Path, part: &str) -> Run {
    let temp = temp.to_str().unwrap();
    let more = [("DIESEL_SESSION_TEST_DIR", ""), ("TMPDIR", temp), ("USER", "victim")];
    Run::start(&Server::sqlite(), part, &more).ended()
}

/// The same with a folder that the variable names.
fn run_with(folder: &Path, part: &str) -> Run {
    Run::start(&Server::sqlite(), part, &[("DIESEL_SESSION_TEST_DIR", folder.to_str().unwrap())]).ended()
}

struct Victim {
    temp: tempfile::TempDir,
    file: PathBuf,
}

impl Victim {
    fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        fs::set_permissions(temp.path(), fs::Permissions::from_mode(0o1777)).unwrap();
        let file = temp.path().join("victim.sqlite");
        fs::write(&file, "precious").unwrap();
        Self { temp, file }
    }

    /// Another user's folder, with links by the names that the next processes will use.
    fn attacked(&self, name: &str, mode: u32) -> PathBuf {
        let folder = self.temp.path().join(name);
        fs::create_dir(&folder).unwrap();
        for process in std::process::id()..std::process::id() + 3000 {
            symlink(&self.file, folder.join(format!("trial-{process}"))).unwrap();
            symlink(&self.file, folder.join(format!("trial-{process}-0"))).unwrap();
        }
        fs::set_permissions(&folder, fs::Permissions::from_mode(mode)).unwrap();
        folder
    }

    #[track_caller]
    fn assert_untouched(&self) {
        assert_eq!(fs::read_to_string(&self.file).unwrap(), "precious");
    }
}

#[test]
fn a_folder_that_another_user_made_first_is_refused_and_no_link_in_it_is_followed() {
    let victim = Victim::new();
    let folder = victim.attacked("diesel-session-victim", 0o777);
    let run = run_in(victim.temp.path(), "one Database");
    victim.assert_untouched();
    // The administrator of the machine can change the owner of the folder. Another user finds a folder of another user.
    if chown(&folder, Some(12345), None).is_ok() {
        let run = run_in(victim.temp.path(), "one Database");
        assert_eq!(run.code(), Some(101));
        assert!(run.said().contains("it belongs to another user"), "{}", run.said());
        victim.assert_untouched();
    }
    assert_eq!(run.code(), Some(0), "{}", run.said());
}

#[test]
fn a_folder_in_which_everybody_may_replace_files_is_refused() {
    let victim = Victim::new();
    let folder = victim.attacked("shared", 0o777);
    let run = run_with(&folder, "one Database");
    assert_eq!(run.code(), Some(101));
    assert!(run.said().contains("chmod +t"), "{}", run.said());
    victim.assert_untouched();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o1777)).unwrap();
    let run = run_with(&folder, "one Database");
    assert_eq!(run.code(), Some(0), "{}", run.said());
    victim.assert_untouched();
}

#[test]
fn a_link_in_the_place_of_a_folder_or_a_lock_is_not_followed() {
    let victim = Victim::new();
    let shared = victim.temp.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o1777)).unwrap();
    symlink(victim.temp.path(), shared.join("sqlite")).unwrap();
    let run = run_with(&shared, "one Database");
    assert_eq!(run.code(), Some(101));
    assert!(run.said().contains("it is not a folder"), "{}", run.said());
    fs::remove_file(shared.join("sqlite")).unwrap();

    fs::create_dir(shared.join("sqlite")).unwrap();
    symlink(&victim.file, shared.join("sqlite/turn")).unwrap();
    let run = run_with(&shared, "one Database");
    assert_eq!(run.code(), Some(101));
    assert!(run.said().contains("symbolic link"), "{}", run.said());
    victim.assert_untouched();
    assert_eq!(fs::read_dir(victim.temp.path()).unwrap().count(), 2);
}

#[test]
fn a_folder_of_temporary_files_may_have_any_name() {
    for name in ["a?b", "a#b", "a%20b", "a b&c=d", "ä'\"x"] {
        let temp = tempfile::tempdir().unwrap();
        let temp = temp.path().join(name);
        fs::create_dir(&temp).unwrap();
        for part in ["one Database", "one Rollback", "fill Database"] {
            let run = run_in(&temp, part);
            assert_eq!(run.code(), Some(0), "{name}, {part}: {}", run.said());
        }
        assert_eq!(fs::read_dir(&temp).unwrap().count(), 1, "{name}");
        assert_eq!(fs::read_dir(temp.parent().unwrap()).unwrap().count(), 1, "{name}");
    }
}

#[test]
fn template_files_are_kept_up_to_the_documented_number() {
    let server = Server::sqlite();
    for _ in 0..2 {
        server.succeed("many Database");
        server.succeed("one Database");
        let files = fs::read_dir(server.folder.path().join("sqlite")).unwrap().flatten();
        let names: Vec<_> = files.map(|file| file.file_name().into_string().unwrap()).collect();
        assert_eq!(names.iter().filter(|name| name.starts_with("template-")).count(), 8, "{names:?}");
    }
    server.assert_clean();
}

#[test]
fn full_disk_is_named_in_the_error() {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("small");
    fs::create_dir(&folder).unwrap();
    let mount = ["-t", "tmpfs", "-o", "size=700k", "tmpfs"];
    let mounted = Command::new("mount").args(mount).arg(&folder).status();
    if !mounted.is_ok_and(|status| status.success()) {
        let uid = fs::metadata(&folder).unwrap().uid();
        assert_ne!(uid, 0, "only the administrator can make a full disk");
        return;
    }
    let small = run_with(&folder, "one Database");
    // The second one fits into the write-ahead log, but not into the file beside that.
    let full = ["big Database", "half Database"].map(|part| run_with(&folder, part));
    let again = run_with(&folder, "one Database");
    assert!(Command::new("umount").arg(&folder).status().unwrap().success());
    assert_eq!(small.code(), Some(0), "{}", small.said());
    for full in full {
        assert_eq!(full.code(), Some(101));
        assert!(full.said().contains("full") && !full.said().contains("open somewhere"), "{}", full.said());
    }
    assert_eq!(again.code(), Some(0), "what could not be made is gone: {}", again.said());
}
