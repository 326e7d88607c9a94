//! Every coordinator does what the others do.

use super::callback::Group;
use ashore::ranks::{Alone, Callback, Coordinator, SharedDirectory};
use ashore::testing::ranks::{Kind, run};
use std::sync::Arc;

#[test]
fn one_rank_alone() {
    run(Kind::Alone, &[1], || Arc::new(|_, _| Ok(Arc::new(Alone))));
}

#[test]
fn ranks_in_a_shared_directory() {
    run(Kind::Board, &[2, 5], || {
        let root = tempfile::tempdir().unwrap();
        Arc::new(move |_, member| Ok(Arc::new(SharedDirectory::new(root.path(), member)?) as Arc<dyn Coordinator>))
    });
}

#[test]
fn ranks_that_gather_by_a_callback() {
    // The group's size is that of the test, whatever its ranks say.
    for world in [2, 5] {
        run(Kind::Collective, &[world], || {
            let group = Group::new(world);
            Arc::new(move |seat, member| {
                let group = Arc::clone(&group);
                let all_gather = move |message: &[u8], deadline| group.all_gather(seat, message, deadline);
                Ok(Arc::new(Callback::new(member, all_gather)?) as Arc<dyn Coordinator>)
            })
        });
    }
}
