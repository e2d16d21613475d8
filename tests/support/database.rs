/// A fresh database of the role `app`, removed on drop, even if sessions are connected to it.
pub struct Database {
    name: String,
    url: String,
    remove: Box<Remove>,
}

type Remove = dyn Fn(&str) -> Result<(), String> + Send + Sync;

impl Database {
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn url(&self) -> String {
        self.url.clone()
    }

    pub(super) fn new(
        name: String,
        url: String,
        remove: impl Fn(&str) -> Result<(), String> + Send + Sync + 'static,
    ) -> Database {
        Database { name, url, remove: Box::new(remove) }
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        // Not a failure of the test: its server may have been killed on purpose.
        if let Err(error) = (self.remove)(&self.name) {
            eprintln!("database {} was not removed: {error}", self.name);
        }
    }
}
