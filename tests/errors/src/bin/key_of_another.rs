//~ error[E0308]: mismatched types
//~ expected `Fk<User>`, found `Fk<Post>`
use errors::{DB, Db, NewPost, Post};

fn main() {
    let session: Db = DB.session().unwrap();
    let post = session.find::<Post>(1).unwrap();
    let _ = session.add(NewPost { author_id: post.key() });
}
